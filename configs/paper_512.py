"""The paper's generator: Emu Video's UNet, 16 views of 512 px (Sec. 3.1; arXiv 2311.10709, appendix).

Size it up:     im3d plan --config=configs/paper_512.py --mesh data=80 --accelerator a100
Fine-tune it:   im3d train --config=configs/paper_512.py --workdir=runs/paper_512
Devices: 80 A100 for 5 days in the paper. Neither Emu Video's weights nor the paper's are public, so this
config has not been trained here; put the paths of your text encoders and autoencoder where "" stands below.

The network predicts v over a schedule of zero terminal SNR, as Emu Video's 512 px stages do. The loss that
IM-3D writes down is that of epsilon, which says nothing where there is no signal. For it:
  --config.backbone.kwargs.prediction_type=epsilon --config.schedule.zero_terminal_snr=false
"""

from ml_collections import ConfigDict

from configs import base

# What the tables of Emu Video's appendix leave open is the inside of a temporal attention block.
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
    # Guidance: Emu Video's. Its distribution over steps and the solver's order: unspecified in the paper.
    config.text_to_image.w_text = 7.5
    config.video.update(w_image=2.0, w_text=7.5, tie_first_view=False)
    config.turntable.update(num_frames=120, size=512)
    # Paper: rate, batch, what trains, and 5 days. Steps, warm-up, average and the shares of assets that
    # keep their conditions, for guidance: unspecified.
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
