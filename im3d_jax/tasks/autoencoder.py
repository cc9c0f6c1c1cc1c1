"""The task of an autoencoder: frames -> latents -> the same frames (Rombach et al. 2022, Sec. 3.1).

IM-3D takes Emu Video's, which is not public. This one trains the same architecture, from scratch or from any
public one's weights; all of it, or with `trainable="decoder|post_quant_conv"` the decoder alone, for which
latents, and diffusion models of them, stay as they are.

Rombach et al.: L1, LPIPS, a discriminator's loss and a slight KL. Here: L1, structural similarity and the KL,
because LPIPS needs weights that are not ours to ship, and a second network trained against the first needs a
loop of its own, which only pays where textures matter more than what is there. Expect softer textures.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float

from im3d_jax import costs, sharding
from im3d_jax.autoencoders import kl as kl_module
from im3d_jax.autoencoders import kl_network
from im3d_jax.backbones.layers import PARTITION_RULES
from im3d_jax.data import Example, pipeline
from im3d_jax.data.sources import open_source
from im3d_jax.training.state import join, split_params
from recon_torch.errors import UserError

ENCODER = r"^(encoder|quant_conv)/"
LOG_VARIANCE = (-30.0, 20.0)  # bounds of the posterior's, as in the public code of latent diffusion
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # in pixels (Wang et al. 2004)
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
NUM_SAMPLES = 2  # turntables to look at
NUM_MEASURED = 16  # objects whose latents' standard deviation is measured


class Terms(NamedTuple):
    """Of each of B examples; see `Autoencoder.terms`."""

    l1: Float[Array, " B"]
    ssim: Float[Array, " B"]
    kl: Float[Array, " B"]
    psnr: Float[Array, " B"]


class AutoencoderTask:
    """The task, see `im3d_jax.tasks`.

    `config.autoencoder.kwargs` has the sizes of an `autoencoder_kl.Architecture`, `config.train.init_from`
    may name a file of weights of those sizes in diffusers' layout.
    """

    partition_rules = PARTITION_RULES
    constants = ()

    def __init__(self, config, mesh: Mesh):
        sizes = {name: value for name, value in config.autoencoder.kwargs.items() if name != "path"}
        self.architecture = kl_network.read_architecture("", **sizes)
        self.network = kl_network.Network(self.architecture)
        self.config, self.weights = config, config.train.autoencoder
        self.architecture.latent_shape(config.size)
        if config.size < SSIM_WINDOW:
            raise UserError(f"config.size is {config.size}; the loss of an autoencoder needs {SSIM_WINDOW}")

    def init(self, key: Array) -> dict:
        return self.architecture.init(key)

    def load(self, path: str) -> dict:
        """Parameters of a safetensors file in diffusers' layout. Raises UserError if they do not fit."""
        return kl_network.read_params(path, self.architecture)

    def stream(self, name: str) -> None:
        return None  # all streams train alike

    def collate(self, examples: Sequence[Example]) -> dict[str, Float[np.ndarray, "B K H W 3"]]:
        if "latents" in examples[0]:
            raise UserError("the data set holds latents, an autoencoder trains on views; build it with views")
        return {"rgb": pipeline.stack_views(examples)[0]}

    def draw(self, key: Array, num_examples: int, stream: None) -> Array:
        """A key for each example's noise."""
        return jax.random.split(key, num_examples)

    def loss(self, params, constants, batch: dict, keys: Array, stream: None):
        """w_l1 L1 + w_ssim (1 - SSIM) + w_kl KL, and the sums over examples of each and of the PSNR."""
        terms = self.terms(params, batch["rgb"], keys)
        weights = self.weights
        losses = weights.w_l1 * terms.l1 + weights.w_ssim * (1 - terms.ssim) + weights.w_kl * terms.kl
        return losses.mean(), {name: term.sum() for name, term in terms._asdict().items()}

    def terms(self, params, rgb: Float[Array, "B K H W 3"], keys: Array) -> Terms:
        """How a drawn latent's image differs from the image, per pixel and channel, which are in [0, 1].

        kl: of the posterior from the unit normal, in nats, a sum over the latent divided by the number of the
            image's values. psnr in dB.
        """
        moments = self._apply(params, rgb * 2 - 1, "encode")
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        log_variance = jnp.clip(log_variance, *LOG_VARIANCE)
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        made = self._apply(params, mean + jnp.exp(log_variance / 2) * noise, "decode") / 2 + 0.5
        kl = (mean**2 + jnp.exp(log_variance) - 1 - log_variance) / 2
        axes = (1, 2, 3, 4)
        return Terms(
            l1=jnp.abs(made - rgb).mean(axes),
            ssim=jax.vmap(ssim)(made, rgb).mean(-1),
            kl=kl.sum(axes) / rgb[0].size,
            psnr=-10 * jnp.log10(((jnp.clip(made, 0, 1) - rgb) ** 2).mean(axes)),
        )

    def _apply(self, params, arrays: Array, method: str | None) -> Array:
        return self.network.apply({"params": params}, arrays, method=method)

    def flops(self, trainable: str, stream_name: str) -> float:
        """FLOPs of the networks in a step, forward and backward."""
        stream, size = self.config.train.streams[stream_name], self.config.size
        trained, frozen = split_params(jax.eval_shape(self.init, jax.random.key(0)), trainable)
        rgb = jax.ShapeDtypeStruct((1, stream.num_views, size, size, 3), jnp.float32)

        def loss(trained, frozen, rgb):
            return self._apply(join(frozen, trained), rgb, None).sum()

        return float(costs.count_flops(costs.trace(jax.grad(loss), trained, frozen, rgb)) * stream.batch_size)

    def sample(self, params, key: Array) -> dict[str, Float[np.ndarray, "K H W2 3"]]:
        """The first turntables of the data, by name, each view beside what the autoencoder makes of it."""
        rgb = self._first_views(NUM_SAMPLES)
        codec = self._unscaled(params)
        made = sharding.to_host(codec.decode(codec.encode(rgb, rgb[..., :1]))[0])
        return {f"{number:02d}": each for number, each in enumerate(np.concatenate([rgb, made], axis=-2))}

    def save(self, directory: Path, params, metadata: dict) -> Path:
        """Writes `directory`/autoencoder as diffusers does, for `config.autoencoder.kwargs.path`.

        Where the encoder trains, its scaling factor is measured: latents get a standard deviation of 1
        (Rombach et al. 2022, appendix G).
        """
        architecture = self.architecture
        if any(map(re.compile(self.config.train.trainable).search, self._encoder_paths())):
            rgb = self._first_views(NUM_MEASURED)
            latents = np.asarray(self._unscaled(params).encode(rgb, rgb[..., :1]), np.float64)
            architecture = dataclasses.replace(architecture, scaling_factor=float(1 / latents.std()))
        path = directory / "autoencoder"
        kl_network.write(path, params, architecture)
        return path

    def _unscaled(self, params) -> kl_module.AutoencoderKL:
        architecture = dataclasses.replace(self.architecture, scaling_factor=1.0, shift_factor=0.0)
        return kl_module.AutoencoderKL(params, architecture, "in training")

    def _encoder_paths(self) -> list[str]:
        params = traverse_util.flatten_dict(jax.eval_shape(self.init, jax.random.key(0)), sep="/")
        return [path for path in params if re.match(ENCODER, path)]

    def _first_views(self, count: int) -> Float[np.ndarray, "B K H W 3"]:
        """Of the first objects of the first stream: the same ones at every call and on every process."""
        config, stream = self.config, next(iter(self.config.train.streams.values()))
        source = open_source(**stream.data, seed=config.seed, size=config.size, num_views=stream.num_views)
        examples = pipeline.open_stream(
            source,
            seed=config.seed,
            batch_size=count,
            shard=pipeline.Shard(0, 1),
            shuffle=bool(stream.data.path),
            **config.train.loader,
        )
        rgb = self.collate(next(examples))["rgb"]
        examples.close()
        return rgb


def ssim(x: Float[Array, "N H W C"], y: Float[Array, "N H W C"]) -> Float[Array, " N"]:
    """Structural similarity (Wang et al. 2004) of images in [0, 1], 1 where equal. Windows stay inside."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    rows, columns = (_bands(window, length) for length in x.shape[1:3])

    def blur(images):
        # Variances are differences of near equals, which a TPU's or GPU's usual precision would lose.
        return jnp.einsum("nhwc,ih,jw->nijc", images, rows, columns, precision="highest")

    mean_x, mean_y = blur(x), blur(y)
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return (luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).mean((1, 2, 3))


def _bands(window: Float[np.ndarray, " k"], length: int) -> Float[np.ndarray, "l-k+1 l"]:
    """The matrix that slides a window along `length` values, staying inside."""
    steps = np.arange(length) - np.arange(length - len(window) + 1)[:, None]
    return np.where((steps >= 0) & (steps < len(window)), window[steps % len(window)], 0).astype(np.float32)


def build(config, mesh: Mesh) -> AutoencoderTask:
    """The task of a config."""
    return AutoencoderTask(config, mesh)
