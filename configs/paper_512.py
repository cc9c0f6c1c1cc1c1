"""The paper's generator: Emu Video's UNet, 16 views of 512 px (Sec. 3.1; arXiv 2311.10709, appendix).

Plan:    im3d plan --config=configs/paper_512.py --mesh data=80 --accelerator a100
Command: im3d train --config=configs/paper_512.py --workdir=runs/paper_512
Devices: the paper's are 80 A100, for 5 days.
Result:  not trained here, because neither Emu Video's weights nor the paper's are public.

Put the paths of your text encoders and of your autoencoder where "" stands below.

The network predicts v, with a schedule of zero terminal SNR, as the 512 px stages of Emu Video do. The loss
that IM-3D states is that of epsilon, which has no signal at the last noise level. To train with it, add
    --config.backbone.kwargs.prediction_type=epsilon --config.schedule.zero_terminal_snr=false
"""

from ml_collections import ConfigDict

from configs import base

# The tables of Emu Video's appendix do not say what is inside a temporal attention block.
TEMPORAL_NOTE = (
    "of our temporal parameters 0.72B are feed-forward layers, 0.30B attention and 0.35B convolutions; the "
    "paper says only that an attention over time follows each spatial one. With cross-attention to the text "
    "in it, as in spatial blocks, there would be 1.63B, with a second self-attention, as in ModelScope, 1.61B"
)


def get_config() -> ConfigDict:
    config = base.get_config()
    config.size = 512
    config.backbone = dict(
        name="emu_video",
        kwargs=dict(
            latent_shape=(64, 64, 8),
            model_channels=384,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=(3, 4, 4, 4),
            attention_levels=(0, 1, 2),  # downsampling 1, 2 and 4
            head_dim=64,
            num_transformer_layers=2,
            text_dims=(768, 2048),  # the first layer attends to CLIP, the second to T5
            max_words=77,
            prediction_type="v",
            dtype="bfloat16",
            remat="nothing_saveable",
            query_chunk=512,
        ),
    )
    config.published = dict(total=4.3e9, spatial=2.7e9, temporal=1.7e9, note=TEMPORAL_NOTE)
    config.autoencoder = dict(name="autoencoder_kl", kwargs=dict(path="", dtype="bfloat16"))
    encoders = (dict(kind="clip", path="", max_length=77), dict(kind="t5", path="", max_length=77))
    config.text = dict(name="pretrained", kwargs=dict(encoders=encoders))
    # The guidance scales are Emu Video's. The paper specifies neither the solver nor the spacing of steps.
    config.text_to_image.w_text = 7.5
    config.video.update(w_image=2.0, w_text=7.5, tie_first_view=False)
    config.turntable.update(num_frames=120, size=512)
    # The paper gives the learning rate, the batch, what trains, and 5 days. It specifies neither the number
    # of steps, the warm-up and the moving average, nor how often conditions are dropped for guidance.
    config.train = base.training(
        streams=dict(turntable=dict(batch_size=240)),
        trainable="temporal",
        frozen_dtype="bfloat16",
        num_steps=40_000,
        warmup_steps=1000,
        learning_rate=1e-5,
        ema_decay=0.9999,
    )
    return config
