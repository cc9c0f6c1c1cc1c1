"""One call of each backbone against diffusers' torch module with the same weights, in the same run.

    python benchmarks/backbone.py                                        # small networks on one CPU core
    python benchmarks/backbone.py --only svd --threads 4 --repeats 20
    python benchmarks/backbone.py --full                                 # full sizes in bfloat16, on a GPU

A call is 16 frames of one asset; `emu_video` has them as 16 separate images, because its peer has no time.
Both sides are warmed up and take turns, so that what else the machine does meets both; times are medians.
Ours is compiled by jax.jit, diffusers runs as it comes. `difference` is the greatest between the outputs,
over the greatest output. At full size there is the paper's network as well, which has no public peer.

`wan` is 5 latent frames of 16 x 16 places and 512 tokens of text through a small transformer, and `wan_block`
through one block of TI2V-5B's size, in float32 without --full; with it all of TI2V-5B in its place.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import torch

from im3d_jax import backbones, config_flags
from im3d_jax.backbones import wan_checkpoints, wan_network
from im3d_jax.backbones.wan_sizes import PUBLISHED, Architecture
from recon_torch import hosting

hosting.declare()
import diffusers  # noqa: E402  (imports torchvision)

diffusers.utils.logging.set_verbosity_error()  # it warns of casts that are all the same here

FRAMES = 16
SMALL = dict(block_out_channels=(32, 64, 128, 128), layers_per_block=1, cross_attention_dim=32)
HEADS = dict(num_attention_heads=(2, 4, 8, 8), addition_time_embed_dim=32)


# ---- Pairs: (our model, diffusers' module, its call on our inputs) ----


def emu_video(full: bool):
    """Stable Diffusion 2's layout."""
    if full:
        ours, theirs = dict(num_res_blocks=(2,) * 4), dict(attention_head_dim=(5, 10, 20, 20))
        width, side, text = 320, 64, 1024
    else:
        ours, theirs = dict(num_res_blocks=(1,) * 4, head_dim=8), dict(attention_head_dim=(4, 8, 16, 16))
        width, side, text = 32, 16, 32
        theirs |= SMALL
    sizes = dict(latent_shape=(side, side, 4), model_channels=width, num_transformer_layers=1)
    module = diffusers.UNet2DConditionModel(
        use_linear_projection=True, **{"cross_attention_dim": text, **theirs}
    )

    def call(noisy, timestep, text):
        return module(noisy[:, 0], timestep, text, return_dict=False)[0][:, None]

    kwargs = dict(text_dims=(text,), max_words=77, prediction_type="epsilon", **sizes, **ours)
    return "emu_video", kwargs, module, call


def svd(full: bool):
    sizes = {} if full else {**SMALL, **HEADS}
    embedded = {} if full else dict(projection_class_embeddings_input_dim=96)
    module = diffusers.UNetSpatioTemporalConditionModel(**sizes, **embedded)
    side = 64 if full else 16

    def call(noisy, timestep, tokens):
        told = noisy.new_tensor([[6, 127, 0.02]])  # the defaults of `svd.Model`
        # Without an image, as in `empty_conditioning`.
        channels = torch.cat([noisy, torch.zeros_like(noisy)], 2)
        return module(channels, timestep, tokens, told, return_dict=False)[0]

    kwargs = dict(latent_shape=(side, side, 4), num_views=None, **sizes)
    return "svd", kwargs, module, call


def unet3d(full: bool):
    """ModelScope's layout."""
    sizes = {} if full else dict(norm_num_groups=8, **SMALL)
    module = diffusers.UNet3DConditionModel(attention_head_dim=64 if full else 8, **sizes)

    def call(noisy, timestep, text):
        return module(noisy.transpose(1, 2), timestep, text, return_dict=False)[0].transpose(1, 2)

    side, head_dim = (64, 64) if full else (16, 8)
    return "unet3d", dict(latent_shape=(side, side, 4), head_dim=head_dim, **sizes), module, call


PAIRS = {"emu_video": emu_video, "svd": svd, "unet3d": unet3d}

WAN = {
    "wan": Architecture(
        num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=4, text_dim=256
    ),
    "wan_block": replace(PUBLISHED["ti2v_5b"], num_layers=1),
}


# ---- Timing ----


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*PAIRS, *WAN], help="one backbone instead of all")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores that either side may use")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="full sizes in bfloat16; needs a GPU")
    flags = parser.parse_args()
    # Before JAX's first array, when it counts its cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    torch.set_num_threads(flags.threads)
    if flags.full and jax.default_backend() != "gpu":
        sys.exit("--full needs a GPU that JAX sees")

    print(f"{FRAMES} frames, {jax.devices()[0].device_kind}, {flags.threads} CPU thread(s)")
    print(f"{'backbone':<10} {'diffusers':<33} {'ours':>10} {'theirs':>10} {'theirs/ours':>12} difference")
    for name in [flags.only] if flags.only else [*PAIRS, *WAN]:
        if name in PAIRS:
            print(compare(*PAIRS[name](flags.full), flags.full, flags.repeats), flush=True)
        else:
            print(compare_wan(name, flags.full, flags.repeats), flush=True)
    if flags.full and flags.only in (None, "emu_video"):
        print(time_paper_size(flags.repeats), flush=True)


def compare(name: str, kwargs: dict, module, call, full: bool, repeats: int) -> str:
    """A row of the table."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = backbones.build(name, kwargs | {"dtype": "bfloat16" if full else "float32"})
    torch.manual_seed(0)
    for parameter in module.eval().parameters():  # also what starts at zero and would hide a difference
        parameter.data += 0.02 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as directory:
        module.save_pretrained(directory)
        params = model.from_pretrained(directory, model.init(jax.random.key(0)))
    inputs = draw(model, *((FRAMES, 1) if name == "emu_video" else (1, FRAMES)))
    noisy, timestep, given = inputs
    tokens = given.text[0] if given.text else given.image_tokens
    dtype = torch.bfloat16 if full else torch.float32
    module.to(device, dtype)
    tensors = [torch.tensor(np.asarray(array)).to(device, dtype) for array in (noisy, timestep, tokens)]
    tensors[0] = tensors[0].movedim(-1, 2)
    apply = jax.jit(model.apply)
    params = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.dtype(model.dtype)), params))

    @torch.no_grad()
    def theirs():
        output = call(*tensors)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    return row(name, module, lambda: apply(params, *inputs), lambda: theirs().movedim(2, -1), repeats)


def compare_wan(name: str, full: bool, repeats: int) -> str:
    """A row of the table. Weights that start at zero or one are moved as well."""
    spec = PUBLISHED["ti2v_5b"] if full and name == "wan_block" else WAN[name]
    device, dtype = ("cuda", torch.bfloat16) if full else ("cpu", torch.float32)
    spec = replace(spec, dtype=str(dtype).removeprefix("torch."))
    sizes = "num_attention_heads in_channels out_channels ffn_dim num_layers attention_head_dim text_dim"
    torch.manual_seed(0)
    module = diffusers.WanTransformer3DModel(**{each: getattr(spec, each) for each in sizes.split()})
    for parameter in module.eval().parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as directory:
        module.to(dtype).save_pretrained(directory)
        params = wan_checkpoints.from_pretrained(directory, spec)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 5, 16, 16, spec.in_channels), np.float32)
    text = rng.standard_normal((1, 512, spec.text_dim), np.float32)
    timestep = np.array([500.0], np.float32)
    inputs = [jnp.asarray(each) for each in (latents, timestep, text)]
    module.to(device)
    theirs = [torch.from_numpy(each).to(device) for each in (latents, timestep, text)]
    theirs[0], theirs[2] = theirs[0].movedim(-1, 1).to(dtype), theirs[2].to(dtype)

    @torch.no_grad()
    def call():
        output = module(*theirs, return_dict=False)[0].movedim(1, -1)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    apply = jax.jit(wan_network.Transformer(spec).apply)
    return row(name, module, lambda: apply({"params": params}, *inputs), call, repeats)


def row(
    name: str, module, ours: Callable[[], jax.Array], theirs: Callable[[], torch.Tensor], repeats: int
) -> str:
    """A row of the table, of two calls that give the same."""
    calls = (lambda: ours().block_until_ready(), theirs)
    (our_seconds, found), (their_seconds, expected) = take_turns(calls, repeats)
    expected = expected.float().cpu().numpy()
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    times = f"{1e3 * our_seconds:7.1f} ms {1e3 * their_seconds:7.1f} ms {their_seconds / our_seconds:11.2f}x"
    return f"{name:<10} {type(module).__name__:<33} {times} {difference:10.1e}"


def time_paper_size(repeats: int) -> str:
    """The row of configs/paper_512.py with random weights, in bfloat16 like all of the computation."""
    kwargs = config_flags.load("configs/paper_512.py").backbone.kwargs.to_dict()
    model = backbones.build("emu_video", kwargs)

    @jax.jit
    def init(key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(key))

    params, inputs, apply = init(jax.random.key(0)), draw(model, 1, FRAMES), jax.jit(model.apply)
    ((seconds, _),) = take_turns([lambda: apply(params, *inputs).block_until_ready()], repeats)
    return f"{'emu_video':<10} {'none (configs/paper_512.py)':<33} {1e3 * seconds:7.1f} ms"


def draw(model, batch: int, frames: int):
    """Random inputs of `model.apply`: no image, and text that it attends to in full."""
    rng = np.random.default_rng(0)
    given = model.empty_conditioning(batch)
    text = tuple(jnp.asarray(rng.standard_normal(tokens.shape), jnp.float32) for tokens in given.text)
    given = given._replace(text=text, text_mask=jax.tree.map(jnp.ones_like, given.text_mask))
    noisy = jnp.asarray(rng.standard_normal((batch, frames, *model.latent_shape)), jnp.float32)
    return noisy, jnp.full(batch, 0.5), given


def take_turns(calls, repeats: int) -> list[tuple[float, np.ndarray]]:
    """(median seconds, result) of each call, after one that is not counted."""
    results, seconds = [call() for call in calls], [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return [(statistics.median(times), result) for times, result in zip(seconds, results, strict=True)]


if __name__ == "__main__":
    main()
