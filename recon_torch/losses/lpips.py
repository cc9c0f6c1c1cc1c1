"""LPIPS (Zhang et al. 2018), the fit's main loss (Sec. 3.3), with the lpips package's networks and heads."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from recon_torch import hosting, weights_files
from recon_torch.errors import UserError

TORCHVISION_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}

RANDOM_BACKBONE_SEED = 0


class PerceptualDistance:
    """LPIPS that computes the features of its targets once, because they change only between rounds.

    Attributes:
        random_weights: whether no backbone weights were found, so that its convolutions are random (from a
            fixed seed). The distance is then still a loss that tells shapes apart, but not the published
            metric.
        stages: the stages of the backbone's convolutions: five, or seven for "squeeze".
    """

    stages: list[torch.nn.Module]

    def __init__(
        self,
        net: str = "vgg",
        weights: str | os.PathLike = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        """Loads the network.

        Args:
            net: "vgg", "alex" or "squeeze".
            weights: a file of backbone weights with torchvision's names (.pth or .safetensors); "random"; or
                "auto" for the file in torchvision's cache, or random weights where there is none.

        Raises:
            UserError: an unknown net, or a weights file that is missing or does not fit the net.
        """
        if net not in TORCHVISION_FILES:
            raise UserError(f"unknown LPIPS net {net!r}; choose from {', '.join(TORCHVISION_FILES)}")
        model: Any = _lpips_model(net)  # has attributes of lpips's own
        if weights == "auto":
            weights = cached_weights(net) or "random"
        self.random_weights = weights == "random"
        if not self.random_weights:
            _load_backbone(model.net, Path(weights), net)
        self._scale_input = model.scaling_layer.to(device)
        stages = [getattr(model.net, f"slice{index + 1}") for index in range(model.L)]
        self.stages = [stage.to(device, memory_format=torch.channels_last) for stage in stages]
        heads = [head.model[-1].weight.detach() for head in model.lins]
        # The heads' weights are not negative, so that the features can be multiplied by their square root.
        self._root_weights = [head.clamp_min(0).sqrt().flatten().to(device) for head in heads]

    def rounded(self, dtype: torch.dtype, num_stages: int | None = None) -> PerceptualDistance:
        """A copy of the first stages, or of all, that convolves in another dtype and is float32 elsewhere."""
        copied = copy.copy(self)
        copied.stages = [copy.deepcopy(stage).to(dtype) for stage in self.stages[:num_stages]]
        return copied

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def features(
        self, images: Float[Tensor, "K H W 3"], num_stages: int | None = None
    ) -> list[Float[Tensor, "K _ _ _"]]:
        """Features [K,C,h,w] of the first stages, or of all. LPIPS is their mean squared distance."""
        activations = self._activations(images, num_stages)
        return [
            F.normalize(activation, eps=1e-10) * root_weight.view(-1, 1, 1)
            for activation, root_weight in zip(activations, self._root_weights, strict=False)
        ]

    def distance(
        self, images: Float[Tensor, "K H W 3"], target_features: list[Float[Tensor, "K _ _ _"]]
    ) -> Float[Tensor, " K"]:
        """LPIPS of each view, over the stages that `target_features`, the `features` of the targets, have."""
        activations = self._activations(images, len(target_features))
        stages = zip(activations, target_features, self._root_weights, strict=False)
        first, *others = (_stage_distance(*stage) for stage in stages)
        return sum(others, start=first)

    def _activations(
        self, images: Float[Tensor, "K H W 3"], num_stages: int | None
    ) -> list[Float[Tensor, "K _ _ _"]]:
        """The outputs [K,C,h,w] of the first stages, as float32."""
        activations, dtype = [], next(self.stages[0].parameters()).dtype
        # Permuted like this, the images make the convolutions work with channels last.
        activation = self._scale_input(images.permute(0, 3, 1, 2) * 2 - 1).to(dtype)
        for stage in self.stages[:num_stages]:
            activation = stage(activation)
            activations.append(activation.float())
        return activations


@functools.cache
def perceptual_distance(net: str, weights: str, device: torch.device) -> PerceptualDistance:
    """The network, loaded once for all fits of a process; so it warns once of missing weights, too."""
    distance = PerceptualDistance(net, weights, device)
    if distance.random_weights and weights != "random":
        warnings.warn(
            f"no weights for LPIPS's {net} backbone: losses go without it, scores use random ones; name a "
            "file in lpips_weights, or 'random'",
            stacklevel=2,
        )
    return distance


def _stage_distance(
    activation: Float[Tensor, "K C h w"], target: Float[Tensor, "K C h w"], root_weight: Float[Tensor, " C"]
) -> Float[Tensor, " K"]:
    if activation.device.type == "cpu":
        from recon_torch.losses.lpips_cpu import stage_distance  # numba takes a second to import

        return stage_distance(activation, target, root_weight)
    difference = F.normalize(activation, eps=1e-10) * root_weight.view(-1, 1, 1) - target
    return difference.square().sum(1).mean((1, 2))


def _lpips_model(net: str) -> torch.nn.Module:
    """The lpips package's network with trained heads and a random backbone that ignores the global seed."""
    hosting.declare()
    import lpips  # after the declaration: it imports torchvision

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips passes arguments that torchvision has deprecated
        torch.manual_seed(RANDOM_BACKBONE_SEED)
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return model.requires_grad_(False)


def cached_weights(net: str) -> Path | None:
    """The file of a network's trained weights in torchvision's cache, if it is there."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILES[net]
    return cached if cached.is_file() else None


def _load_backbone(backbone: torch.nn.Module, path: Path, net: str) -> None:
    """Fills the lpips package's slices (slice2.5.weight) from torchvision's names (features.5.weight)."""
    weights = weights_files.read_either(path, "LPIPS weights")
    names = {name: "features." + name.split(".", 1)[1] for name in backbone.state_dict()}
    try:
        found = {name: weights[source] for name, source in names.items()}
        fitting = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
        if {name: tensor.shape for name, tensor in found.items()} != fitting:
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"LPIPS weights {path} are not those of torchvision's {net} network") from None
    what = f"LPIPS weights {path}"
    backbone.load_state_dict(
        {name: weights_files.to_float32(tensor, names[name], what) for name, tensor in found.items()}
    )
