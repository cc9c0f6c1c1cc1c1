"""Stable Video Diffusion XT fine-tuned to turntables of 576 px: only temporal layers train (Sec. 3.1).

Data:    im3d dataset build --views renders --out data/turntables_576 --embed --latents
                            --config=configs/svd_xt.py
Weights: im3d convert --config=configs/svd_xt.py --from stable-video-diffusion-img2vid-xt/unet
                      --to weights/svd_xt.safetensors
Plan:    im3d plan --config=configs/svd_576.py --mesh data=8,fsdp=4 --accelerator h100
Command: im3d train --config=configs/svd_576.py --workdir=runs/svd_576 --cluster slurm
Devices: 32 H100 of 80 GB, data=8,fsdp=4. 2.6 hours for 20,000 steps, as `im3d plan` estimates (0.46 s a step
         at 40% of the peak, 21 GB a device); not measured.
Result:  not trained here, because no public weights were at hand. SV3D, which is the same network trained on
         renders of Objaverse, reaches 21.04 dB on the orbits of GSO (Ouroboros3D, table 1).

The data set holds latents and the tokens of the image encoder, so that neither runs while training.
"""

from ml_collections import ConfigDict

from configs import base, svd_xt


def get_config() -> ConfigDict:
    config = svd_xt.get_config()
    config.train.streams.turntable = base.stream(batch_size=64, path="data/turntables_576", keep_image=0.85)
    config.train.update(num_steps=20_000, max_skipped=10, hang_timeout_s=900.0, tensorboard=True)
    config.train.loader.update(num_threads=8, buffer=4, max_corrupt=100)
    config.train.checkpoint.update(every=500, keep=2, keep_every=5000, weights_every=5000)
    return config
