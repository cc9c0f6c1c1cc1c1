"""Turntables on disk: a tfds data set of array_record shards, written and read without TensorFlow.

A record is one object. It holds K views as RGBA PNG files, or their latents; the caption, the cameras and
their elevation; and what text and image encoders make of the object, if that was cached. Every record can be
read on its own, which the shuffling of `input_pipeline` needs. The data set can also be read with tfds alone:
`tfds.builder_from_directory(PATH).as_data_source("train")`.

Records are written as they come, through `tfds.core.SequentialWriter`. `GeneratorBasedBuilder` would hold the
whole data set in memory to sort it, and would need TensorFlow to put it aside once it exceeds 1 GB.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float
from PIL import Image

from im3d_jax.data import CorruptRecord, Example
from recon_torch import outputs
from recon_torch.errors import UserError, first_line
from recon_torch.files import make_directory
from recon_torch.views.cameras import Cameras

NAME, VERSION = "turntables", "1.0.0"
OBJECTS_PER_SHARD = 256  # about 300 MB of 16 views of 512 px


@dataclass
class Record:
    """One object as it is stored.

    Attributes:
        id: its name, unique in the data set.
        caption: may be "".
        cameras: of the K views, on an orbit at `elevation_rad` around the origin, view k at azimuth
            2 pi k / K from view 0, counter-clockwise seen from above.
        views: K square pictures as PNG files, RGBA with colours that are not multiplied by alpha; None if
            there are latents instead.
        latents: of the views, or the F frames of a clip. All arrays from here on are stored as float16.
        text, text_mask: embeddings and masks of the caption, one of each for every text encoder.
        image_tokens: what the image encoder makes of view 0.
        source: the SHA-256 of what it was made of, see `views.source_digest`; "" if that is not known.
        mesh: the SHA-256 of the file of its mesh; "" if that is not known. Neither is stored with the record.
    """

    id: str
    caption: str
    cameras: Cameras
    elevation_rad: float
    views: Sequence[bytes] | None = None
    latents: Float[np.ndarray, "F h w c"] | None = None
    text: tuple[Float[np.ndarray, "_ _"], ...] = ()
    text_mask: tuple[Float[np.ndarray, " _"], ...] = ()
    image_tokens: Float[np.ndarray, "_ _"] | None = None
    source: str = ""
    mesh: str = ""

    @property
    def size(self) -> int:
        """Side of the views in pixels."""
        return self.cameras.height

    def fields(self) -> dict[str, Any]:
        """The record as tfds takes it: the values of its features by their names.

        Raises UserError for an array with values that float16 cannot hold.
        """
        arrays = {"latents": self.latents, "image_tokens": self.image_tokens}
        arrays |= {f"text_{number}": array for number, array in enumerate(self.text)}
        arrays |= {f"text_mask_{number}": array for number, array in enumerate(self.text_mask)}
        values = {
            "id": self.id,
            "caption": self.caption,
            "elevation_rad": np.float32(self.elevation_rad),
            "w2c": self.cameras.w2c.astype(np.float32),
            "intrinsics_px": self.cameras.intrinsics_px.astype(np.float32),
        }
        values |= {} if self.views is None else {"views": list(self.views)}
        for name, array in arrays.items():
            if array is not None:
                if not np.abs(array).max() <= np.finfo(np.float16).max:
                    raise UserError(f"{self.id}: {name} has NaN or values beyond float16: leave it out")
                values[name] = np.asarray(array, np.float16)
        return values


# ---- Writing ----


class Sources:
    """What a data set was made of, so that two data sets can be told apart or found to be the same."""

    def __init__(self) -> None:
        self._digests: list[str] = []
        self._num_meshes = 0

    def add(self, record: Record) -> None:
        if record.source:
            self._digests.append(record.source)
        self._num_meshes += bool(record.mesh)

    def summary(self) -> dict[str, Any]:
        """The number of objects whose sources are known, of those whose mesh is known, and "sha256".

        That is a digest of all sources, which depends on neither their order nor their splits.
        """
        joined = "".join(sorted(self._digests)).encode()
        num_objects, sha256 = len(self._digests), hashlib.sha256(joined).hexdigest()
        return {"sha256": sha256, "num_objects": num_objects, "num_meshes": self._num_meshes}


def refuse_taken(out: str | Path) -> None:
    """Raises UserError if a data set cannot be written there, because something is there already."""
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out} is there already; remove it, or choose another --out")


def write(
    out: str | Path,
    records: Iterable[tuple[str, Record]],
    splits: Sequence[str],
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes a data set, whole or not at all.

    Args:
        out: its directory, which must be empty if it exists.
        records: (split, record) pairs. All records must have as many views, of one size, and the same arrays.
        splits: the names of all splits; a split may stay empty.
        metadata: JSON values that are kept with the data set, such as what encoded the records. "sources" is
            added to them, see `Sources`.

    Returns the number of records of each split. Raises UserError if there are none, or if `out` is taken.
    """
    out = Path(out)
    refuse_taken(out)
    make_directory(out.parent)
    records = iter(records)
    first = next(records, None)
    if first is None:
        raise UserError(f"there are no objects to write to {out}")
    metadata = {**(metadata or {}), "num_views": len(first[1].cameras), "size": first[1].size}
    counts, sources = dict.fromkeys(splits, 0), Sources()
    with outputs.owned(out.parent) as staging:
        whole = staging / out.name
        whole.mkdir()
        info = _dataset_info(whole, first[1], metadata)
        writer = tfds.core.SequentialWriter(info, OBJECTS_PER_SHARD, file_format="array_record")
        writer.initialize_splits(list(splits))
        for split, record in chain([first], records):
            writer.add_examples({split: [record.fields()]})
            counts[split] += 1
            sources.add(record)
        info.metadata["sources"] = sources.summary()
        writer.close_all()  # writes the metadata, too
        try:
            os.replace(whole, out)
        except OSError as error:
            raise UserError(f"cannot write {out} ({error.strerror}); choose another --out") from error
    return counts


def _dataset_info(directory: Path, like: Record, metadata: Mapping[str, Any]) -> tfds.core.DatasetInfo:
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=tfds.core.Version(VERSION), data_dir=os.fspath(directory), module_name=__name__
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description="Objects seen from an orbit of cameras (IM-3D, Sec. 3.1).",
        features=_features(like),
        metadata=tfds.core.MetadataDict(metadata),
    )


def _features(like: Record) -> tfds.features.FeaturesDict:
    """The features of records that are like this one."""

    def feature(name: str, value: Any) -> tfds.features.FeatureConnector:
        if name == "views":
            picture = tfds.features.Image(shape=(like.size, like.size, 4), encoding_format="png")
            return tfds.features.Sequence(picture, length=len(value))
        if isinstance(value, str):
            return tfds.features.Text()
        encoding = "bytes" if value.dtype == np.float16 else "none"  # a list of floats holds float32 only
        return tfds.features.Tensor(shape=value.shape, dtype=value.dtype, encoding=encoding)

    return tfds.features.FeaturesDict({name: feature(name, value) for name, value in like.fields().items()})


# ---- Reading ----


class TurntableSource:
    """The objects of one split of a data set. A `Source`.

    Args:
        path: the data set's directory.
        split: for instance "train".
        size: the side of the views in pixels that is expected; None takes any.
        num_views: how many evenly spaced ones of the stored views to give; None gives all.

    Attributes:
        metadata: what `write` was told, with "num_views" and "size".

    Raises UserError if there is no data set, if it holds no turntables, if it has not this split or size, and
    if its views cannot be thinned out to `num_views`.
    """

    def __init__(
        self, path: str | Path, split: str = "train", size: int | None = None, num_views: int | None = None
    ):
        builder = _open(Path(path))
        self.path, self.split, self.metadata = Path(path), split, dict(builder.info.metadata)
        self.size, total = self.metadata["size"], self.metadata["num_views"]
        if size not in (None, self.size):
            raise UserError(
                f"{path} has views of {self.size} px, not {size} px: render and build it again with"
                f" `im3d dataset render --size {size}`, or change config.size"
            )
        self.num_views = total if num_views is None else num_views
        if self.num_views < 1 or total % self.num_views:
            fitting = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            raise UserError(
                f"{path} has {total} views, {num_views} are no even share of them: give {fitting}"
            )
        if "clip" in self.metadata and self.num_views not in (1, total):
            raise UserError(
                f"{path} holds latents of clips that show {total} views; give 1 or {total} views, not"
                f" {self.num_views}, or build it without --latents"
            )
        self._step = total // self.num_views
        self._starts = np.cumsum([0, *_shard_lengths(builder, self.path, split)])
        self._features = builder.info.features
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        name = f"{self.split}-{shard:05d}/{index - self._starts[shard]}"
        try:
            return self._example(name, self._fields(self._records[index]))
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes raise whatever their parsers raise
            raise CorruptRecord(f"{self.path}/{name}", first_line(error, 200)) from error

    def _fields(self, record: bytes) -> dict:
        if not record:
            raise ValueError("the record is empty, its shard may be cut off")
        decoders = {"views": _Encoded()} if "views" in self._features else None
        return self._features.deserialize_example_np(record, decoders=decoders)

    def _example(self, name: str, fields: dict) -> Example:
        example = Example(
            id=f"{name}/{fields['id'].decode()}",
            caption=fields["caption"].decode(),
            elevation_rad=float(fields["elevation_rad"]),
        )
        if "views" in fields:
            files = list(fields["views"][:: self._step])
            example["rgb"], example["alpha"] = decode_views(files, self.size)
        else:
            # Of a clip the first frame is that of view 0 alone, and there are fewer frames than views.
            example["latents"] = fields["latents"][:: self._step].astype(np.float32)
        numbers = range(sum(key.startswith("text_mask_") for key in fields))
        if numbers:
            example["text"] = tuple(fields[f"text_{n}"] for n in numbers)
            example["text_mask"] = tuple(fields[f"text_mask_{n}"].astype(np.float32) for n in numbers)
        if "image_tokens" in fields:
            example["image_tokens"] = fields["image_tokens"]
        if not np.isfinite(example["elevation_rad"]):
            raise ValueError("its elevation is NaN or infinite")
        return example


def decode_views(
    files: Sequence[bytes], size: int
) -> tuple[Float[np.ndarray, "K H W 3"], Float[np.ndarray, "K H W 1"]]:
    """Decodes RGBA PNG files to rgb over white and alpha, both in [0, 1].

    Raises ValueError, or OSError of Pillow, for files of another size or kind.
    """
    rgb = np.empty((len(files), size, size, 3), np.float32)
    alpha = np.empty((len(files), size, size, 1), np.float32)
    for view, file in enumerate(files):
        with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
            if image.size != (size, size) or image.mode != "RGBA":
                found = f"{image.width}x{image.height} {image.mode}"
                raise ValueError(f"view {view} is {found}, not {size}x{size} RGBA")
            pixels = np.asarray(image)
        np.divide(pixels[..., 3:], 255, out=alpha[view], dtype=np.float32)
        share = alpha[view, ..., 0] / 255
        for channel in range(3):  # one channel at a time is four times as fast as broadcasting alpha
            rgb[view, ..., channel] = 1 + (pixels[..., channel].astype(np.float32) - 255) * share
    return rgb, alpha


def read_splits(path: str | Path) -> dict[str, int]:
    """The number of objects of each split. Raises UserError if there is no data set in `path`."""
    return {name: sum(split.shard_lengths) for name, split in _open(Path(path)).info.splits.items()}


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves the views as PNG files, so that only those that are asked for are decoded."""

    def decode_batch_example_np(self, example: Any) -> Any:
        return example


def _open(path: Path) -> tfds.core.DatasetBuilder:
    """Opens a data set of turntables. Raises UserError if there is none in `path`."""
    if not (path / "dataset_info.json").is_file():
        raise UserError(f"no data set in {path}: build one with `im3d dataset build`, or correct the path")
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # tfds raises whatever its parsers raise
        raise UserError(
            f"the data set in {path} is damaged ({first_line(error, 200)}): build it again"
        ) from error
    if builder.info.name != NAME or not {"size", "num_views"} <= set(builder.info.metadata or ()):
        raise UserError(f"{path} holds no turntables: build some with `im3d dataset build`")
    return builder


def _shard_lengths(builder: tfds.core.DatasetBuilder, path: Path, split: str) -> list[int]:
    """The number of records in each file of a split. Raises UserError for an empty split or missing file."""
    splits = builder.info.splits
    if split not in splits or not splits[split].shard_lengths:
        known = ", ".join(name for name, each in splits.items() if each.shard_lengths)
        raise UserError(f"{path} has no objects in split {split!r}; there is {known}")
    for file in splits[split].filepaths:
        if not file.is_file():
            raise UserError(f"{file} is missing: copy the data set again, or build it again")
    return list(splits[split].shard_lengths)
