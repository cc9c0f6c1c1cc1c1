"""SV3D_p: SV3D that is told its cameras, so that the elevation of the views is known.

Voleti et al. 2024 (arXiv 2403.12008). `config.elevation.deg` is that of the picture and of all views.

Weights: im3d convert --config=configs/sv3d_p.py --from sv3d_p.safetensors --to weights/sv3d_p.safetensors
Command: im3d generate --config=configs/sv3d_p.py --config.elevation.deg=10 --image mug.png --out out/mug
Devices: `im3d plan --config=configs/sv3d_p.py` estimates them.
Result:  not measured, because no public weights were at hand.

The autoencoder and the image encoder are those of configs/sv3d_u.py.
"""

from ml_collections import ConfigDict

from configs import sv3d_u


def get_config() -> ConfigDict:
    config = sv3d_u.get_config()
    config.weights = config.train.init_from = "weights/sv3d_p.safetensors"
    config.backbone.kwargs.vector = "sv3d_p"
    config.elevation.deg = 10.0
    return config
