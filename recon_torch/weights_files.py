"""Files of weights as users bring them: found, named for what they are, and read.

Only safetensors are read, because reading a pickle runs whatever code it holds. What else a user may have
in its place is told apart by its first bytes, and named with what to do about it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import string
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from recon_torch.errors import UserError, first_line
from recon_torch.text_files import DOWNLOAD, STAND_INS, Kind, read_settings

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"

SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")
"""What tells the shards of one set of weights apart, such as model-00001-of-00002.safetensors."""

PICKLED = (".bin", ".ckpt", ".pt", ".pth")

NUM_FIRST_BYTES = 512
MAX_HEADER_BYTES = 100_000_000  # which safetensors allows

CONVERT = (
    "convert it to safetensors, as docs/backbones.md shows, or fetch the .safetensors that lies beside it"
)
GIVE = "give the .safetensors of the model"
UNPACK = "unpack it, and give the .safetensors in it"


KINDS = (
    *STAND_INS,
    Kind(rb"(\xef\xbb\xbf)?\s*<\?xml", "XML, such as the error of a server", DOWNLOAD),
    Kind(rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON, such as a config or the error of a server", GIVE),
    Kind(rb"\x80[\x02-\x05]", "pickled", CONVERT),
    Kind(rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed archive", UNPACK),
    Kind(rb"(?s).{257}ustar", "a tar archive", UNPACK),
    Kind(rb"GGUF", "a GGUF file, whose weights are quantised", GIVE),
    Kind(rb"\x89HDF", "an HDF5 file, as Keras writes", GIVE),
    Kind(rb"\x93NUMPY", "a NumPy array", GIVE),
    Kind(rb"\0{16}", "zeros where its header belongs, as in a download that has not ended", DOWNLOAD),
)

KINDS_BY_SUFFIX = {
    ".onnx": "an ONNX file",
    ".msgpack": "weights of Flax in msgpack",
    ".pb": "a TensorFlow graph",
}

FLOATS = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
"""Types all of whose values float32 holds."""

FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
INTEGER_TYPES = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
"""Types as safetensors calls them: of weights, and of buffers such as the positions of tokens."""

SCALE = re.compile(r"\.(scale_weight|weight_scale|weight_scale_inv)$")
"""Names of what a layer's 8-bit weight is to be multiplied by: ComfyUI's, old and new, and DeepSeek's."""

QUANTISED = "; weights that are quantised to integers are not read, give the original ones"


# ---- Where the weights are ----


def find(path: str | Path) -> list[Path]:
    """The .safetensors files of one set of weights: a file, or the shards of a directory or an index.

    Raises UserError, which says what there is instead, if there is none, if shards are missing, and for a
    directory that holds several sets or is that of a whole pipeline.
    """
    path = Path(path)
    if path.name.endswith(INDEX) and path.is_file():
        return _indexed(path)
    if path.is_file():
        return _whole_set(path, list(path.parent.glob(f"*{SUFFIX}"))) if SHARD.search(path.name) else [path]
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there; copy the file itself")
    refuse_pipeline(path)
    if indices := sorted(path.glob(f"*{INDEX}"), key=_plain_first):
        return _indexed(indices[0])
    if files := sorted(path.glob(f"*{SUFFIX}"), key=_plain_first):
        return _whole_set(_only_set(path, files), files)
    if pickled := sorted(file for file in path.glob("*") if file.suffix in PICKLED):
        raise UserError(f"no {SUFFIX} weights at {path}: {pickled[0].name} is pickled; {CONVERT}")
    hint = (
        f"give one of its directories{folders}"
        if (folders := _folders(path))
        else "give a file or a directory"
    )
    raise UserError(f"no {SUFFIX} weights at {path}; {hint}")


def refuse_pipeline(path: Path) -> None:
    """Raises UserError for the directory of a whole pipeline, which names those of its models."""
    if (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is a whole pipeline; give the directory of one of its models{_folders(path)}"
        )


def check_directory(path: Path) -> None:
    """Checks the weights in a directory that another library reads, which would convert whatever is there.

    Raises UserError for a file that `check` refuses, a missing shard, and weights that are no plain floats.
    """
    for index in sorted(path.glob(f"*{INDEX}")):
        _indexed(index)
    for file in sorted(path.glob(f"*{SUFFIX}")):
        with opened(file) as each:
            types = {name: each.get_slice(name).get_dtype() for name in each.keys()}  # noqa: SIM118 - no dict
        _check_types(types, file)


def _check_types(types: Mapping[str, str], path: Path) -> None:
    for name, kind in types.items():
        if kind in INTEGER_TYPES and name.endswith((".weight", ".bias")):  # and not of a buffer
            raise UserError(f"{path}: {name} is of type {kind}{QUANTISED}")
        if kind not in (*FLOAT_TYPES, *INTEGER_TYPES):
            raise UserError(f"{path}: {name} is of type {kind}, which is not read")
        if (found := SCALE.search(name)) and types.get(f"{name[: found.start()]}.weight", "").startswith(
            "F8"
        ):
            raise UserError(f"{path}: {name} scales a weight in 8 bits, which is not read here; {GIVE}")


def _plain_first(file: Path) -> tuple[int, str]:
    return len(file.name), file.name


def _folders(path: Path) -> str:
    """The directories that hold models: ", such as pipeline/unet, pipeline/vae"; "" if there are none."""
    held = {file.parent for suffix in (SUFFIX, *PICKLED) for file in path.glob(f"*/*{suffix}")}
    names = sorted(held, key=lambda folder: (folder.name not in ("unet", "transformer"), folder.name))
    return f", such as {', '.join(map(str, names[:3]))}" if names else ""


def _only_set(path: Path, files: Sequence[Path]) -> Path:
    """The first file of the plain set of weights. A directory may hold variants of it, such as NAME.fp16."""
    stems = {SHARD.sub("", file.name).removesuffix(SUFFIX): file for file in reversed(files)}
    plain = min(sorted(stems), key=len)
    if others := sorted(stem for stem in stems if stem != plain and not stem.startswith(f"{plain}.")):
        raise UserError(
            f"{path} holds several sets of weights, {plain} and {others[0]} among them; give one file"
        )
    return stems[plain]


def _whole_set(file: Path, files: Sequence[Path]) -> list[Path]:
    """The shards of the set that a file belongs to, or the file alone."""
    found = SHARD.search(file.name)
    if not found:
        return [file]
    first, last = file.name[: found.start()], file.name[found.end() :]
    count, digits = int(found[2]), len(found[1])
    # One more name than there are files is enough to find one that is missing, whatever count a name claims.
    names = [f"{first}-{i:0{digits}d}-of-{found[2]}{last}" for i in range(1, min(count, len(files) + 1) + 1)]
    return _all_there(file.parent, names, count, "its name")


def _indexed(index: Path) -> list[Path]:
    try:
        shards = read_settings(index)["weight_map"].values()
        names = sorted({Path(shard).name for shard in shards})
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of shards; fetch it again") from None
    return _all_there(index.parent, names, len(names), index.name)


def _all_there(folder: Path, names: Sequence[str], count: int, said_by: str) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        first = missing[0] if missing else "any"
        raise UserError(
            f"{folder} lacks shard {first} of the {count} that {said_by} tells of; fetch it as well"
        )
    return [folder / name for name in names]


# ---- What a file is ----


def check(path: str | Path, pickled_too: bool = False) -> None:
    """Raises UserError, which says what a file is instead, unless it is a whole safetensors file.

    pickled_too: whether one that PyTorch has pickled will do, for `torch.load(weights_only=True)`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(NUM_FIRST_BYTES)
            length = int.from_bytes(first[:8], "little")
            is_header = first[8:9] == b"{" and length <= MAX_HEADER_BYTES
            header = (first[8:] + file.read(max(0, 8 + length - len(first))))[:length] if is_header else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if not is_header:
        kind = _kind(path, first)
        if pickled_too and kind.endswith(CONVERT):
            return
        raise UserError(f"{path} {kind}")
    try:
        ends = [
            entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"
        ]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        if len(header) < length:
            raise UserError(
                f"{path} is cut off within its header, at {size:,} bytes; fetch it again"
            ) from None
        raise UserError(f"{path} is damaged: its header makes no sense; fetch it again") from None
    if size != expected:
        problem = "cut off" if size < expected else "too long"
        raise UserError(f"{path} is {problem}: it has {size:,} of {expected:,} bytes; fetch it again")


def _kind(path: Path, first: bytes) -> str:
    """What a file is that is no safetensors file, and what to do, as the end of a sentence."""
    if not first:
        return f"is empty; {DOWNLOAD}"
    if zipfile.is_zipfile(path):
        return _zip_kind(path)
    for kind in KINDS:
        if re.match(kind.pattern, first):
            return f"is {kind.name}; {kind.remedy}"
    if path.suffix in KINDS_BY_SUFFIX:
        return f"is {KINDS_BY_SUFFIX[path.suffix]}; {GIVE}"
    text = first.decode("ascii", "replace").strip()
    if text and all(each.isspace() or each in string.printable for each in text):
        return f"is text, which begins with {text.splitlines()[0][:40]!r}; {DOWNLOAD}"
    return f"is no safetensors file; {GIVE}"


def _zip_kind(path: Path) -> str:
    with contextlib.suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return f"is pickled, by PyTorch; {CONVERT}"
        if names and all(name.endswith(".npy") for name in names):
            return f"is an archive of NumPy arrays; {GIVE}"
    return f"is a zip archive; {UNPACK}"


# ---- Reading ----


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[safe_open]:
    """An open safetensors file, whose tensors are torch's. Raises UserError for what is none, see `check`."""
    check(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({first_line(error, 120)}); fetch it again") from None


def read_either(path: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that PyTorch has pickled, which is read without its code.

    what: it is, for errors.

    Raises UserError for a file that is missing or is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} {path} do not exist")
    try:
        check(path, pickled_too=path.suffix != SUFFIX)
        found = load_file(path) if path.suffix == SUFFIX else torch.load(path, "cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"{what} {error}") from None
    except Exception as error:  # damaged files make the two loaders raise a dozen types of errors
        raise UserError(f"{what} {path} cannot be read: {first_line(error, 80)}") from None
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UserError(f"{what} {path} are no tensors by name; give those of the network alone")
    return found


def to_float32(tensor: Tensor, name: str, path: str | Path) -> Float[Tensor, "..."]:
    """A tensor of a file as float32, which holds all its values.

    Raises UserError that names the tensor if it is complex, of integers or of a type that is not read, if it
    holds NaN or infinity, and if float32 does not hold one of its values.
    """
    if tensor.dtype not in (*FLOATS, torch.float64):
        is_integer = not tensor.is_complex() and not tensor.is_floating_point()
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} is {kind}{QUANTISED if is_integer else ', which is not read'}")
    rounded = tensor.float()
    if rounded.isfinite().all():
        return rounded
    lost = tensor[rounded.isinf() & tensor.isfinite()] if tensor.dtype == torch.float64 else rounded[:0]
    if lost.numel():
        raise UserError(f"{path}: {name} holds {lost[0]:.3g}, which is too large for float32")
    raise UserError(f"{path}: {name} holds NaN or infinity; fetch, convert or train it again")
