"""What the renders are compared by (Sec. 3.3): LPIPS, MS-SSIM and a mask loss (10, 0.2 and 1 in the fit).

All images are float32 [K,H,W,3] in [0, 1]. LPIPS is Zhang et al. 2018 with the lpips package's networks and
heads; MS-SSIM is Wang et al. 2003.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch import torchvision_operators
from recon_torch.errors import UserError

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest scale first
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
# A power below 1 has an infinite slope at 0 and no value below it, so what is opposed counts as this.
LOWEST_SIMILARITY = 1e-4

TORCHVISION_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
RANDOM_BACKBONE_SEED = 0


def mask_loss(alpha: Float[Tensor, "K H W 1"], mask: Float[Tensor, "K H W 1"]) -> Float[Tensor, " K"]:
    """Mean squared difference between the rendered opacity and the foreground mask, of each view."""
    return (alpha - mask).square().mean((1, 2, 3))


def rgb_loss(rgb: Float[Tensor, "K H W 3"], target: Float[Tensor, "K H W 3"]) -> Float[Tensor, " K"]:
    """Mean squared difference of each view's pixels: what Table 2 puts in LPIPS's place."""
    return (rgb - target).square().mean((1, 2, 3))


def l1_loss(
    rgb: Float[Tensor, "K H W 3"],
    alpha: Float[Tensor, "K H W 1"],
    target: Float[Tensor, "K H W 3"],
    mask: Float[Tensor, "K H W 1"],
    background: float,
) -> Float[Tensor, " K"]:
    """Mean absolute difference of colour times opacity, and of opacity, of views on that grey background.

    Without the background, as the colours on it are the same for a haze of its own grey around the object.
    """
    premultiplied = (rgb - target) + background * (alpha - mask)
    return torch.cat([premultiplied, alpha - mask], -1).abs().mean((1, 2, 3))


def ssim(images: Float[Tensor, "K H W 3"], targets: Float[Tensor, "K H W 3"]) -> Float[Tensor, " K"]:
    """Structural similarity of each view (Wang et al. 2004), 1 where equal. Windows stay inside the image."""
    x, y = images.permute(0, 3, 1, 2), targets.permute(0, 3, 1, 2)
    return _similarity(x, y, with_luminance=True).mean((1, 2, 3))


def ms_ssim(images: Float[Tensor, "K H W 3"], targets: Float[Tensor, "K H W 3"]) -> Float[Tensor, " K"]:
    """Multi-scale structural similarity of each view, 1 where equal; differentiable by the images.

    Paper (Wang et al. 2003): five scales, a factor two apart. Here: those in which the window of 11 px
    fits (three at 64 px, four at 128 px, five from 176 px), with the weights renormalised.
    """
    side = min(images.shape[1:3])
    num_scales = max(1, sum(side >> scale >= SSIM_WINDOW for scale in range(len(MS_SSIM_WEIGHTS))))
    weights = [weight / sum(MS_SSIM_WEIGHTS[:num_scales]) for weight in MS_SSIM_WEIGHTS[:num_scales]]
    if images.device.type == "cpu" and images.dtype == torch.float32:
        from recon_torch import ms_ssim_cpu  # numba takes a second to import

        constants = torch.tensor([SSIM_C1, SSIM_C2, LOWEST_SIMILARITY])
        window = _gaussian_window(side, images.dtype, images.device)
        return ms_ssim_cpu.ms_ssim(images, targets.detach(), window, torch.tensor(weights), constants)
    return _ms_ssim_in_torch(images.permute(0, 3, 1, 2), targets.permute(0, 3, 1, 2).detach(), weights)


def _ms_ssim_in_torch(x: Tensor, y: Tensor, weights: list[float]) -> Tensor:
    result = 1.0
    for scale, weight in enumerate(weights):
        coarsest = scale == len(weights) - 1
        similarity = _similarity(x, y, with_luminance=coarsest).mean((2, 3))
        result = result * similarity.clamp_min(LOWEST_SIMILARITY) ** weight
        if not coarsest:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result.mean(1)


def _similarity(x: Tensor, y: Tensor, with_luminance: bool) -> Tensor:
    """SSIM, or its contrast-structure part alone, in each window of images [K,C,H,W]."""
    mean_x, mean_xx, mean_xy = _blur(torch.cat([x, x * x, x * y], 1)).chunk(3, 1)
    mean_y, mean_yy = _blur(torch.cat([y, y * y], 1)).chunk(2, 1)
    product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    contrast = (2 * (mean_xy - product) + SSIM_C2) / (mean_xx + mean_yy - squares + SSIM_C2)
    return contrast * (2 * product + SSIM_C1) / (squares + SSIM_C1) if with_luminance else contrast


def _blur(images: Tensor) -> Tensor:
    """[K,C,H,W] averaged by a Gaussian window, where that lies inside the image."""
    channels, side = images.shape[1], min(images.shape[2:])
    column = _gaussian_window(side, images.dtype, images.device).view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    return F.conv2d(F.conv2d(images, column, groups=channels), column.mT, groups=channels)


@functools.lru_cache(maxsize=64)
def _gaussian_window(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The window that fits into an image of that side."""
    size = min(SSIM_WINDOW, side - 1 + side % 2)
    offsets = torch.arange(size, dtype=dtype, device=device) - size // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    return window / window.sum()


class PerceptualDistance:
    """LPIPS with the targets' features computed once: targets change only at the method's restarts.

    Attributes:
        random_weights: no backbone weights were found, so its convolutions are random (seeded, the same every
            run). The distance is then still a loss that tells shapes apart, but not the published metric.
        num_stages: the backbone's stages: five, or seven of squeeze.
    """

    def __init__(
        self,
        net: str = "vgg",
        weights: str | os.PathLike = "auto",
        device: torch.device | str = "cpu",
    ):
        """Args:
            net: "vgg", "alex" or "squeeze".
            weights: a file of the backbone's in torchvision's naming (.pth, .safetensors); "random"; or
                "auto": torchvision's cache, and random ones where that has none.

        Raises:
            UserError: an unknown net, or a weights file that is missing or does not fit the net.
        """
        if net not in TORCHVISION_FILES:
            raise UserError(f"unknown LPIPS net {net!r}; choose from {', '.join(TORCHVISION_FILES)}")
        model = _lpips_model(net)
        if weights == "auto":
            cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILES[net]
            weights = cached if cached.is_file() else "random"
        self.random_weights = weights == "random"
        if not self.random_weights:
            _load_backbone(model.net, Path(weights), net)
        self.num_stages = model.L
        self._scale_input = model.scaling_layer.to(device)
        stages = [getattr(model.net, f"slice{index + 1}") for index in range(model.L)]
        self._stages = [stage.to(device, memory_format=torch.channels_last) for stage in stages]
        heads = [head.model[-1].weight.detach() for head in model.lins]
        # The heads' weights are not negative, so their root can go into the features.
        self._root_weights = [head.clamp_min(0).sqrt().flatten().to(device) for head in heads]

    def rounded(self, dtype: torch.dtype, num_stages: int | None = None) -> PerceptualDistance:
        """A copy of the first stages (default all) that convolves in another dtype; all else is float32."""
        copied = copy.copy(self)
        copied._stages = [copy.deepcopy(stage).to(dtype) for stage in self._stages[:num_stages]]
        copied.num_stages = len(copied._stages)
        return copied

    def features(self, images: Float[Tensor, "K H W 3"], num_stages: int | None = None) -> list[Tensor]:
        """One [K,C,h,w] tensor of each of the first stages (default all); LPIPS is the squared distance."""
        activations = self._activations(images, num_stages)
        return [
            F.normalize(activation, eps=1e-10) * root_weight.view(-1, 1, 1)
            for activation, root_weight in zip(activations, self._root_weights, strict=False)
        ]

    def distance(
        self, images: Float[Tensor, "K H W 3"], target_features: list[Tensor]
    ) -> Float[Tensor, " K"]:
        """LPIPS of each view; target_features are `features(targets)`; the stages they have are used."""
        activations = self._activations(images, len(target_features))
        stages = zip(activations, target_features, self._root_weights, strict=False)
        return sum(_stage_distance(*stage) for stage in stages)

    def _activations(self, images: Float[Tensor, "K H W 3"], num_stages: int | None) -> list[Tensor]:
        """float32 [K,C,h,w] of each of the first stages."""
        activations, dtype = [], next(self._stages[0].parameters()).dtype
        # Images with channels last make a network with channels last.
        activation = self._scale_input(images.permute(0, 3, 1, 2) * 2 - 1).to(dtype)
        for stage in self._stages[:num_stages]:
            activation = stage(activation)
            activations.append(activation.float())
        return activations


@functools.cache
def perceptual_distance(net: str, weights: str, device: torch.device) -> PerceptualDistance:
    """Loaded once for all fits of a process; the warning thus comes once, too."""
    distance = PerceptualDistance(net, weights, device)
    if distance.random_weights and weights != "random":
        warnings.warn(
            f"no weights for LPIPS's {net} backbone: losses go without it, scores use random ones; name a "
            "file in lpips_weights, or 'random'",
            stacklevel=2,
        )
    return distance


def _stage_distance(activation: Tensor, target: Tensor, root_weight: Tensor) -> Float[Tensor, " K"]:
    if activation.device.type == "cpu":
        from recon_torch.lpips_cpu import stage_distance  # numba takes a second to import

        return stage_distance(activation, target, root_weight)
    difference = F.normalize(activation, eps=1e-10) * root_weight.view(-1, 1, 1) - target
    return difference.square().sum(1).mean((1, 2))


def _lpips_model(net: str) -> torch.nn.Module:
    """lpips' network with its trained heads and a random backbone, whatever the global seed is."""
    torchvision_operators.declare()
    import lpips  # after the declaration: it imports torchvision

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates the arguments that lpips passes
        torch.manual_seed(RANDOM_BACKBONE_SEED)
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return model.requires_grad_(False)


def _load_backbone(backbone: torch.nn.Module, path: Path, net: str) -> None:
    """Fills lpips' slices (slice2.5.weight) from torchvision's names (features.5.weight)."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"LPIPS weights {path} do not exist") from None
    except Exception as error:  # the two loaders raise a dozen types for damaged files
        reason = (str(error).splitlines() or [""])[0][:80]
        raise UserError(f"LPIPS weights {path} cannot be read: {reason}") from None
    names = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
    try:
        backbone.load_state_dict({name: weights[source] for name, source in names.items()})
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"LPIPS weights {path} are not those of torchvision's {net} network") from None
