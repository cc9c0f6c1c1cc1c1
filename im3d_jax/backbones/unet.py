"""What the UNets of this package share: arguments, the members of the contract that follow, and the levels.

A UNet (Ronneberger et al. 2015, in the layout of Rombach et al. 2022) goes down through levels of ever
smaller latents, through a middle, and up again, where each residual block also sees an output of the way
down. What a residual block and an attention layer are differs from one network to the next: those are its
`Parts`.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Protocol, cast, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from im3d_jax.backbones import Params
from im3d_jax.backbones.layers import (
    PARTITION_RULES,
    AfterConv,
    FrameEmbeddings,
    Frames,
    Resample,
    unchanged,
    upsample,
)
from im3d_jax.conditions.conditioning import Conditioning
from recon_torch.errors import UserError, choice
from recon_torch.ranges import Range

WHAT = "config.backbone.kwargs"
"""Where a user sets the arguments of a model, for errors."""


class Remat(enum.StrEnum):
    """What the backward pass keeps of a block; but for the first, policies of `jax.checkpoint_policies`."""

    KEEP_ALL = ""
    NOTHING = "nothing_saveable"
    DOTS = "dots_saveable"
    DOTS_WITH_NO_BATCH_DIMS = "dots_with_no_batch_dims_saveable"
    EVERYTHING = "everything_saveable"


class ComputeDtype(enum.StrEnum):
    """What a network may compute in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


LatentShape = Sequence[Annotated[int, Range(1, 4096)]]
Channels = Annotated[int, Range(1, 65_536)]
Layers = Annotated[int, Range(0, 64)]
Level = Annotated[int, Range(0, 31)]
MaxWords = Annotated[int, Range(1, 4096)]


@dataclass(frozen=True, kw_only=True)
class UNetModel(abc.ABC):
    """The arguments and members that all UNets have behind the backbone contract.

    A subclass adds its arguments, their check, its network `net` and its conditions. Lists are made tuples
    and strings members of their enums, so that a model is hashable: it is a static argument of `jax.jit`.

    Args:
        latent_shape: (h, w, c) of one frame's latent; h and w are multiples of 2^(levels - 1).
        dtype: of the computation, as JAX names it. Normalisation, softmax and the embedding of the noise
            level stay float32.
        remat: what the backward pass keeps of each block; it computes the rest again, which saves memory.
        query_chunk: how many places of a frame attend to the others at a time, a divisor of their number; 0
            for all at once, which at 64x64 places takes 64 MB for each frame and head.
    """

    latent_shape: LatentShape
    dtype: ComputeDtype | str = ComputeDtype.FLOAT32
    remat: Remat | str = Remat.KEEP_ALL
    query_chunk: Annotated[int, Range(0, 2**24)] = 0

    choices: ClassVar[dict[str, type[enum.StrEnum]]] = {}
    """The arguments of the subclass that are members of an enum, or sequences of such."""

    partition_rules: ClassVar = PARTITION_RULES
    traceable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        kinds: dict[str, type[enum.StrEnum]] = {"remat": Remat, "dtype": ComputeDtype, **self.choices}
        for name in (field.name for field in fields(self)):
            value, kind, where = getattr(self, name), kinds.get(name), f"{WHAT}.{name}"
            if isinstance(value, (list, tuple)):
                value = tuple(choice(kind, each, where) if kind else each for each in value)
            elif kind:
                value = choice(kind, value, where)
            object.__setattr__(self, name, value)
        for problem in self.problems():
            raise UserError(f"{WHAT}: {problem}")

    @property
    @abc.abstractmethod
    def net(self) -> nn.Module:
        """The network, a function of (noisy, timestep, conditioning)."""

    @abc.abstractmethod
    def empty_conditioning(self, batch: int) -> Conditioning:
        """See `Backbone.empty_conditioning`."""

    @abc.abstractmethod
    def problems(self) -> Iterator[str]:
        """What is wrong with the arguments, and why, beginning with `latent_problems`."""

    def latent_problems(self, num_levels: int) -> Iterator[str]:
        """Why latents of this shape cannot pass through so many levels, or be attended to in such chunks."""
        if len(self.latent_shape) != 3:
            yield f"latent_shape {self.latent_shape} is not (height, width, channels)"
            return
        height, width = self.latent_shape[:2]
        divisor = 2 ** (num_levels - 1)
        if height % divisor or width % divisor:
            yield f"latent_shape {self.latent_shape} is not divisible by {divisor}; change config.size"
        places = [height * width // 4**level for level in range(num_levels)]
        if any(count > self.query_chunk > 0 and count % self.query_chunk for count in places):
            yield f"query_chunk {self.query_chunk} does not divide the places {places}"

    def level_problems(self, num_levels: int, **of_levels: Sequence[Any]) -> Iterator[str]:
        """Why arguments that have an entry for each level do not suffice for so many levels."""
        if not num_levels:
            yield "there are no levels"
        for name, values in of_levels.items():
            if len(values) < num_levels:
                yield f"{name} {values} has {len(values)} entries for {num_levels} levels"

    def init(self, key: PRNGKeyArray) -> Params:
        """Parameters, with every temporal layer at the identity."""
        noisy = jnp.zeros((1, 2, *self.latent_shape))
        return self.net.init(key, noisy, jnp.zeros(1), self.empty_conditioning(1))["params"]

    def apply(
        self, params: Params, noisy: Frames, timestep: Float[Array, " B"], conditioning: Conditioning
    ) -> Frames:
        """The network's prediction, float32, of type `prediction_type`."""
        prediction = self.net.apply({"params": params}, noisy, timestep, conditioning)
        return cast(Array, prediction)  # alone, because no collection is mutable


# ---- The levels ----


class Way(enum.Enum):
    """Where in a UNet a block stands."""

    DOWN = enum.auto()
    MIDDLE = enum.auto()
    UP = enum.auto()


@runtime_checkable
class Residual(Protocol):
    """Applies a residual block, with as many channels as its level has, to frames and their embeddings."""

    def __call__(
        self, x: Frames, emb: FrameEmbeddings, level: int, index: int, way: Way
    ) -> Float[Array, "B K h w out"]: ...


@runtime_checkable
class Attend(Protocol):
    """Applies attention within the frames, to a context, and across the frames."""

    def __call__(self, x: Frames, context: Any, level: int, index: int) -> Frames: ...


@dataclass(frozen=True)
class Parts:
    """What the levels of one UNet are made of.

    The functions create submodules, whose names end in `index`, of the module that is being traced.

    Attributes:
        num_blocks: residual blocks of each level on the way down; on the way up there is one more.
        attention_levels: levels with attention after each residual block. The middle has it in any case.
        after_conv: what follows the convolution that changes the size.
    """

    num_blocks: tuple[int, ...]
    attention_levels: tuple[int, ...]
    dtype: Any
    residual: Residual
    attention: Attend
    after_conv: AfterConv = unchanged


def down_and_up(parts: Parts, x: Frames, emb: FrameEmbeddings, context: Any) -> Float[Array, "B K h w out"]:
    """Takes the output of the first convolution through all levels; `context` is what attention is given."""
    num_levels, skips = len(parts.num_blocks), [x]
    for level in range(num_levels):
        x, outputs = DownBlock(parts, level, name=f"down_blocks_{level}")(x, emb, context)
        skips += outputs
    x = MidBlock(parts, name="mid_block")(x, emb, context)
    for i, level in enumerate(reversed(range(num_levels))):
        taken = parts.num_blocks[level] + 1
        x = UpBlock(parts, level, name=f"up_blocks_{i}")(x, skips[-taken:], emb, context)
        skips = skips[:-taken]
    return x


class DownBlock(nn.Module):
    """One level on the way down. Returns its result and the outputs of all its layers, for the way up."""

    parts: Parts
    level: int

    @nn.compact
    def __call__(self, x: Frames, emb: FrameEmbeddings, context: Any) -> tuple[Array, list[Array]]:
        parts, outputs = self.parts, []
        for i in range(parts.num_blocks[self.level]):
            x = parts.residual(x, emb, self.level, i, Way.DOWN)
            if self.level in parts.attention_levels:
                x = parts.attention(x, context, self.level, i)
            outputs.append(x)
        if self.level + 1 < len(parts.num_blocks):
            x = Resample(2, parts.dtype, parts.after_conv, name="downsamplers_0")(x)
            outputs.append(x)
        return x, outputs


class MidBlock(nn.Module):
    """The middle of the network: a residual block, attention, a residual block."""

    parts: Parts

    @nn.compact
    def __call__(self, x: Frames, emb: FrameEmbeddings, context: Any) -> Float[Array, "B K h w out"]:
        level = len(self.parts.num_blocks) - 1
        x = self.parts.residual(x, emb, level, 0, Way.MIDDLE)
        x = self.parts.attention(x, context, level, 0)
        return self.parts.residual(x, emb, level, 1, Way.MIDDLE)


class UpBlock(nn.Module):
    """One level on the way up; takes `skips` from the way down, the last one first."""

    parts: Parts
    level: int

    @nn.compact
    def __call__(
        self, x: Frames, skips: Sequence[Float[Array, "B K h w _"]], emb: FrameEmbeddings, context: Any
    ) -> Float[Array, "B K h2 w2 out"]:
        for i, skip in enumerate(reversed(skips)):
            x = self.parts.residual(jnp.concatenate([x, skip], -1), emb, self.level, i, Way.UP)
            if self.level in self.parts.attention_levels:
                x = self.parts.attention(x, context, self.level, i)
        if self.level:
            after = self.parts.after_conv
            x = Resample(1, self.parts.dtype, after, name="upsamplers_0")(upsample(x))
        return x
