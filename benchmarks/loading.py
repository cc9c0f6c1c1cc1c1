"""Host memory and time of loading a large checkpoint, beside diffusers' from_pretrained in the same run.

    python benchmarks/loading.py                     # 2 GB of bfloat16 in 8 shards
    python benchmarks/loading.py --gigabytes 10 --shards 3

A directory with random weights of a WanTransformer3DModel is written first. Then each side loads it in a
process of its own. `peak` is the most memory that the process held, less what it held after its imports, and
`of the files` is that over the size of the files. Pages of mapped files that are in memory count.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

NAME = "diffusion_pytorch_model"
SIZES = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, in_channels=16, out_channels=16)
"""Of Wan 2.1's 1.3B, but for the number of blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        side, directory = flags.child
        print(json.dumps(SIDES[side](Path(directory))))
        return
    with tempfile.TemporaryDirectory() as directory:
        size = write(Path(directory), flags.gigabytes, flags.shards)
        print(f"{size / 1e9:.2f} GB of bfloat16 in {flags.shards} shards")
        print(f"{'loader':<27} {'peak':>8} {'of the files':>13} {'seconds':>8}")
        for side in SIDES:
            command = [sys.executable, __file__, "--child", side, directory]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            peak, seconds = found["peak"], found["seconds"]
            print(f"{side:<27} {peak / 1e9:5.2f} GB {peak / size:12.2f}x {seconds:8.1f}")


def write(directory: Path, gigabytes: float, shards: int) -> int:
    """Writes random weights of about so many gigabytes; their bytes."""
    from recon_torch import hosting

    diffusers = hosting.library("diffusers")
    with torch.device("meta"):
        module = diffusers.WanTransformer3DModel(**SIZES, num_layers=1)
    block = sum(each.numel() for each in module.blocks.parameters())
    rest = sum(each.numel() for each in module.parameters()) - block
    num_layers = max(1, round((gigabytes * 1e9 / 2 - rest) / block))
    drawn = {
        name: 0.02 * torch.randn(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in module.state_dict().items()
    }
    names = [name for name in drawn if not name.startswith("blocks.")]
    of_block = [name.removeprefix("blocks.0.") for name in drawn if name.startswith("blocks.")]
    names += [f"blocks.{i}.{name}" for i in range(num_layers) for name in of_block]
    weight_map = {}
    for shard in range(shards):
        file = f"{NAME}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        some = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        # Every block has the values of the first, which no loader can know.
        save_file({name: drawn[_first(name)].clone() for name in some}, directory / file)
        weight_map |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))
    config = dict(module.config) | {"_class_name": "WanTransformer3DModel", "num_layers": num_layers}
    (directory / "config.json").write_text(json.dumps(config))
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _first(name: str) -> str:
    kind, _, rest = name.partition(".")
    return f"blocks.0.{rest.partition('.')[2]}" if kind == "blocks" else name


# ---- Each in a process of its own ----


def ours(directory: Path) -> dict[str, float]:
    """The parameters as arrays of JAX, in bfloat16 as they are stored."""
    import jax

    from im3d_jax.backbones import wan_checkpoints

    jax.devices()
    spec = wan_checkpoints.read_sizes(directory)
    return measured(lambda: jax.block_until_ready(wan_checkpoints.from_pretrained(directory, spec)))


def theirs(directory: Path) -> dict[str, float]:
    """The module of torch, in bfloat16."""
    from recon_torch import hosting

    diffusers = hosting.library("diffusers")
    model = diffusers.WanTransformer3DModel
    return measured(
        lambda: model.from_pretrained(directory, torch_dtype=torch.bfloat16, local_files_only=True)
    )


def measured(load) -> dict[str, float]:
    before, begin = resident(), time.perf_counter()
    loaded = load()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert loaded is not None  # what was loaded is still held here
    return {"peak": peak - before, "seconds": seconds}


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


SIDES = {"im3d": ours, "diffusers from_pretrained": theirs}

if __name__ == "__main__":
    main()
