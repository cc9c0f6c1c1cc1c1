"""The paper's fine-tuning: turntables of 512 px, temporal layers only (Sec. 3.1, A.1).

Data:    im3d dataset build --views renders --out data/turntables --embed --latents
                            --config=configs/paper_512.py
Plan:    im3d plan --config=configs/finetune_turntable_512.py --mesh data=80 --accelerator a100
Command: im3d train --config=configs/finetune_turntable_512.py --workdir=runs/512 --cluster slurm
Devices: 80 A100 of 80 GB. Paper: 5 days. Here: 55 hours for 40,000 steps, as `im3d plan` estimates (4.93 s a
         step at 40% of the peak, 63 GB a device); not measured.
Result:  the paper's is its Table 1. Not trained here, for lack of such data and of weights to start from.

`init_from` takes what `im3d convert` makes of the spatial layers of a text-to-image model. The data set holds
latents and text embeddings, so that neither the autoencoder nor the text encoders run in a training step.
They do run to draw samples, so their paths in configs/paper_512.py must be set. Spatial layers stay in
bfloat16; what trains is float32, with bfloat16 arithmetic.
"""

from ml_collections import ConfigDict

from configs import base, paper_512


def get_config() -> ConfigDict:
    config = paper_512.get_config()
    config.train.init_from = "weights/emu_video_512.safetensors"
    config.train.streams.turntable = base.stream(batch_size=240, path="data/turntables")
    config.train.max_skipped = 10
    config.train.hang_timeout_s = 900.0
    config.train.loader.update(num_threads=8, buffer=4, max_corrupt=100)
    config.train.checkpoint.update(every=500, keep=2, keep_every=10_000, weights_every=10_000)
    config.train.tensorboard = True
    config.train.sample.update(
        every=2000, prompts=("a red fire hydrant", "a wicker chair", "a plush owl", "a toy sports car")
    )
    return config
