"""How far two sets of pictures are from each other as a whole: FID, KID and CMMD.

FID (Heusel et al. 2017) and KID (Binkowski et al. 2018) are of torch-fidelity, whose Inception takes the
weights that the published numbers have. CMMD (Jayasumana et al. 2024) is on unit vectors of CLIP, by its
paper those of ViT-L/14 at 336 px. Weights come from local files; nothing is ever fetched.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8

from im3d_jax.data.clip import Clip
from im3d_jax.data.placement import file_digest
from im3d_jax.evaluate import jackknife
from im3d_jax.evaluate.result_file import digest
from recon_torch import hosting, weights_files
from recon_torch.errors import UserError, first_line

WHAT = "Inception weights"
FEATURES = "2048"
BATCH = 32
FEWEST = 2  # pictures of which there is a covariance
FULL_RANK = 2048
"""Pictures from which on the covariance of Inception's vectors may have an inverse."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS_AT_ONCE = 1024

Vectors = Float[np.ndarray, "_ d"]
Picture = UInt8[np.ndarray, "_ _ 3"]


class Inception:
    """The Inception network of FID, on the device of hosted models.

    Attributes:
        network: of torch-fidelity.
        digest: the SHA-256 of the file of its weights.
    """

    def __init__(self, path: Path):
        """path: weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or the same as safetensors.

        Raises UserError if the file is missing or of another network, or torch-fidelity is not installed.
        """
        fidelity = _fidelity("feature_extractor_inceptionv3")
        weights = weights_files.read_either(path, WHAT)
        self.digest = file_digest(path)
        # The package unpickles what it is given: it gets tensors that were read without running any code.
        again = io.BytesIO()
        torch.save(weights, again)
        again.seek(0)
        try:
            network = fidelity.FeatureExtractorInceptionV3("inception", [FEATURES], again)
        except RuntimeError as error:
            why = first_line(error, 60)
            raise UserError(f"{WHAT} {path} are not those of the Inception of FID ({why})") from None
        self.network = network.to(hosting.device())

    @torch.inference_mode()
    def embed(self, pictures: Sequence[Picture]) -> Vectors:
        """The features of pictures, which the network scales to 299 px itself, as the original did."""
        alike = len({picture.shape for picture in pictures}) == 1
        at_once, found = BATCH if alike else 1, []
        for start in range(0, len(pictures), at_once):
            pixels = torch.from_numpy(np.stack(pictures[start : start + at_once])).permute(0, 3, 1, 2)
            found.append(self.network(pixels.to(hosting.device()))[0].cpu())
        return torch.cat(found).double().numpy()


def embed_by_clip(clip: Clip, pictures: Sequence[Picture]) -> Vectors:
    """Unit vectors of pictures, as its processor scales them."""
    starts = range(0, len(pictures), BATCH)
    return np.concatenate([clip.embed_pictures(pictures[start : start + BATCH]) for start in starts])


def frechet(made: Vectors, reference: Vectors) -> float:
    """The squared Frechet distance of Gaussians with the means and the covariances of two sets of vectors."""
    fidelity = _fidelity("metric_fid")
    fitted = [fidelity.fid_features_to_statistics(torch.from_numpy(each)) for each in (made, reference)]
    return float(fidelity.fid_statistics_to_metric(*fitted, False)[fidelity.KEY_METRIC_FID])


def frechet_by_singular_values(made: Vectors, reference: Vectors) -> float:
    """The same number as `frechet`, in a tenth of the time, which intervals need many times.

    With covariances A'A and B'B, the trace of the root of their product is the sum of the singular values of
    AB'. It takes A and B as they come out of a QR decomposition, with no more rows than columns.
    """
    roots = list[Vectors]()
    for each in (made, reference):
        centered = (each - each.mean(0)) / np.sqrt(len(each) - 1)
        roots.append(np.asarray(np.linalg.qr(centered, mode="r")))
    traces = sum((root**2).sum() for root in roots)
    cross = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(((made.mean(0) - reference.mean(0)) ** 2).sum() + traces - 2 * cross)


class Kernel(NamedTuple):
    """KID: its mean and standard deviation over subsets, and how many vectors each of them has."""

    mean: float
    std: float
    subset_size: int


def kernel(made: Vectors, reference: Vectors, seed: int) -> Kernel:
    """The unbiased squared MMD of two sets of vectors with KID's kernel, (x.y / d + 1)^3, over 100 subsets.

    A subset has 1000 of either set, or as many as the smaller one has. It may be below 0.
    """
    fidelity = _fidelity("metric_kid")
    size = min(KID_SUBSET_SIZE, len(made), len(reference))
    settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    found = fidelity.kid_features_to_metric(torch.from_numpy(made), torch.from_numpy(reference), **settings)
    return Kernel(found[fidelity.KEY_METRIC_KID_MEAN], found[fidelity.KEY_METRIC_KID_STD], size)


def cmmd(made: Vectors, reference: Vectors) -> float:
    """1000 times the squared MMD of two sets of unit vectors, with the kernel exp(-|x - y|^2 / (2 * 10^2)).

    As in the paper's code it is the estimate with the diagonals, which is never below 0.
    """
    within = _mean_gaussian(made, made) + _mean_gaussian(reference, reference)
    return CMMD_SCALE * (within - 2 * _mean_gaussian(made, reference))


def _mean_gaussian(one: Vectors, other: Vectors) -> float:
    """The mean of the kernel over all pairs, less 1, which cancels: values near 1 would lose digits."""
    starts = range(0, len(one), ROWS_AT_ONCE)
    total = sum(gaussian_kernel(one[start : start + ROWS_AT_ONCE], other).sum() for start in starts)
    return float(total / (len(one) * len(other)))


def gaussian_kernel(one: Vectors, other: Vectors) -> Float[np.ndarray, "_ _"]:
    """The kernel of CMMD of all pairs, less 1."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.expm1(-squared / (2 * CMMD_SIGMA**2))


def cubic_kernel(one: Vectors, other: Vectors) -> Float[np.ndarray, "_ _"]:
    """The kernel of KID of all pairs."""
    return (one @ other.T / one.shape[1] + 1) ** 3


def _fidelity(module: str) -> Any:
    """A module of torch-fidelity. Raises UserError if that is not installed."""
    hosting.declare()  # it imports torchvision
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError as error:
        why = f"torch-fidelity cannot be imported ({error})"
        raise UserError(f'{why}; install it with pip install "im3d[metrics]"') from None


# ---- Sets of pictures ----


class Embedded(NamedTuple):
    """A set of pictures.

    Attributes:
        names: of the row of each picture.
        inception, clip: their vectors; None without the network.
    """

    names: list[str]
    inception: Vectors | None
    clip: Vectors | None


def embed(
    batches: Iterable[tuple[str, Sequence[Picture]]],
    inception: Inception | None,
    clip: Clip | None,
    what: str,
) -> Embedded:
    """The vectors of the pictures of all rows, which are let go one by one.

    batches: the name and the pictures of each row. what: whose they are, for errors.

    Raises UserError if there are fewer than two pictures.
    """
    names, found = list[str](), [list[Vectors](), list[Vectors]()]
    for name, pictures in batches:
        names += [name] * len(pictures)
        if inception is not None:
            found[0].append(inception.embed(pictures))
        if clip is not None:
            found[1].append(embed_by_clip(clip, pictures))
    if len(names) < FEWEST:
        said = f"{len(names)} picture{'s' * (len(names) != 1)}"
        raise UserError(f"{what}: there is no more than {said}; a distance of distributions needs more")
    return Embedded(names, *(np.concatenate(each) if each else None for each in found))


def distances(made: Embedded, reference: Embedded, seed: int) -> dict[str, Any]:
    """FID, KID and CMMD of a set of pictures from a reference, as a result file has them.

    Unless a set has too few rows, each has an interval, and "without" has its values without each group of
    rows, see `jackknife`; "groups" is equal where the groups are.
    """
    said: dict[str, Any] = {"num_pictures": len(made.names), "num_reference": len(reference.names)}
    said |= dict.fromkeys(("fid", "kid", "kid_std", "kid_subset_size", "cmmd"))
    said |= {
        "intervals": {},
        "without": {},
        "groups": digest([sorted(set(made.names)), sorted(set(reference.names))]),
    }
    groups = jackknife.groups_of(made.names, reference.names)

    def spread(name: str, without: Float[np.ndarray, " G"], least: float = -np.inf) -> None:
        said["intervals"][name] = jackknife.interval(said[name], without, least)
        said["without"][name] = without.tolist()

    if made.inception is not None and reference.inception is not None:
        found, sets = kernel(made.inception, reference.inception, seed), (made.inception, reference.inception)
        said["fid"] = frechet(*sets)
        said |= {"kid": found.mean, "kid_std": found.std, "kid_subset_size": found.subset_size}
        if groups:
            without = jackknife.without_each(frechet_by_singular_values, sets, groups)
            spread("fid", without, least=0.0)
            without = jackknife.mmd_without_each(cubic_kernel, sets, groups, unbiased=True)
            spread("kid", without)
    if made.clip is not None and reference.clip is not None:
        said["cmmd"] = cmmd(made.clip, reference.clip)
        if groups:
            sets = made.clip.astype(np.float64), reference.clip.astype(np.float64)
            without = CMMD_SCALE * jackknife.mmd_without_each(gaussian_kernel, sets, groups, unbiased=False)
            spread("cmmd", without, least=0.0)
    return said
