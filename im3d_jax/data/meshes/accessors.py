"""The arrays of a glTF file, also sparse and compressed ones (glTF 2.0, Sec. 3.6)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from jaxtyping import Float, Num

from im3d_jax.data.meshes.compression import MESHOPT, NoDecoder, decode_meshopt
from im3d_jax.data.meshes.parts import MAX_TRIANGLES
from im3d_jax.data.meshes.pictures import find_beside
from recon_torch.errors import UserError

COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
MAX_ELEMENTS = 3 * MAX_TRIANGLES


def item(document: Mapping[str, Any], kind: str, index: int) -> dict[str, Any]:
    """Entry `index` of a list of the document, such as "accessors". Raises UserError if there is none."""
    entries = document.get(kind, [])
    if not isinstance(index, int) or not 0 <= index < len(entries):
        raise UserError(f"it has no entry {index} in {kind}, which it refers to; export it again")
    return entries[index]


def to_unit(
    array: Num[np.ndarray, "*shape"], integer: np.dtype | str | None = None
) -> Float[np.ndarray, "*shape"]:
    """Normalised integers as floats in [0, 1] or [-1, 1] (Sec. 3.6.2.2). Floats stay what they are.

    Args:
        integer: the type that the file stores, where `array` has a wider one.
    """
    stored = np.dtype(integer or array.dtype)
    if stored.kind == "f":
        return array.astype(np.float64)
    return np.maximum(array.astype(np.float64) / np.iinfo(stored).max, -1.0)


class Accessors:
    """Reads the arrays of one document.

    Args:
        document: the JSON of the file.
        folder: where the files lie that it refers to.
        blob: the binary chunk of a .glb file; None where there is none.
    """

    def __init__(self, document: Mapping[str, Any], folder: Path, blob: bytes | None):
        self._document, self._folder, self._blob = document, folder, blob
        self._buffers: dict[int, bytes] = {}
        self._views: dict[int, tuple[bytes, int | None]] = {}

    def array(self, index: int, *, unit: bool = False) -> Num[np.ndarray, "count components"]:
        """The array of an accessor: float64 where it is normalised, and the file's own type elsewhere.

        Args:
            unit: integers are normalised, whether or not the accessor says so.
        """
        accessor = item(self._document, "accessors", index)
        dtype, components = np.dtype(TYPES[accessor["componentType"]]), COMPONENTS[accessor["type"]]
        count = accessor["count"]
        if not 0 <= count <= MAX_ELEMENTS:
            raise UserError(f"it has an accessor of {count:,} elements; at most {MAX_ELEMENTS:,} are read")
        if "bufferView" in accessor:
            array = self._elements(accessor, count, dtype, components)
        else:
            array = np.zeros((count, components), dtype)
        if "sparse" in accessor:
            array = self._with_sparse(array.copy(), accessor["sparse"])
        return to_unit(array) if unit or accessor.get("normalized", False) else array

    def stored(self, index: int) -> bool:
        """Whether an accessor has data of its own, and not only in a compressed form elsewhere."""
        return "bufferView" in item(self._document, "accessors", index)

    def _elements(
        self, place: Mapping[str, Any], count: int, dtype: np.dtype, components: int
    ) -> Num[np.ndarray, "count components"]:
        content, stride = self.view(place["bufferView"])
        offset, size = place.get("byteOffset", 0), dtype.itemsize * components
        stride = stride or size
        if offset < 0 or stride < 0 or (count and offset + stride * (count - 1) + size > len(content)):
            raise UserError("it has an accessor that reaches beyond its buffer; the file may be cut off")
        return np.ndarray((count, components), dtype, content, offset, (stride, dtype.itemsize))

    def _with_sparse(
        self, array: Num[np.ndarray, "count components"], sparse: Mapping[str, Any]
    ) -> Num[np.ndarray, "count components"]:
        count, indices, values = sparse["count"], sparse["indices"], sparse["values"]
        rows = self._elements(indices, count, np.dtype(TYPES[indices["componentType"]]), 1)
        array[rows[:, 0]] = self._elements(values, count, array.dtype, array.shape[1])
        return array

    def view(self, index: int) -> tuple[bytes, int | None]:
        """The bytes of a buffer view, decompressed, and the stride of its elements where it has one."""
        if index not in self._views:
            view = item(self._document, "bufferViews", index)
            name = next((name for name in MESHOPT if name in view.get("extensions", {})), None)
            self._views[index] = self._meshopt(view, name) if name else self._plain(view)
        return self._views[index]

    def _plain(self, view: Mapping[str, Any]) -> tuple[bytes, int | None]:
        return self._slice(view), view.get("byteStride")

    def _meshopt(self, view: Mapping[str, Any], name: str) -> tuple[bytes, int | None]:
        """A view that meshoptimizer compressed, or the plain copy of it that some files have for us."""
        extension = view["extensions"][name]
        if extension["count"] > MAX_ELEMENTS:
            raise UserError(
                f"it has a view of {extension['count']:,} elements; at most {MAX_ELEMENTS:,} are read"
            )
        try:
            decoded = decode_meshopt(self._slice(extension), extension, name)
        except NoDecoder:
            buffer = item(self._document, "buffers", view["buffer"])
            if "uri" not in buffer or buffer.get("extensions", {}).get(name, {}).get("fallback"):
                raise
            return self._plain(view)
        stride = extension["byteStride"] if extension["mode"] == "ATTRIBUTES" else None
        return decoded.tobytes(), stride

    def _slice(self, place: Mapping[str, Any]) -> bytes:
        start, length = place.get("byteOffset", 0), place["byteLength"]
        content = self._buffer(place["buffer"])
        if start < 0 or length < 0 or start + length > len(content):
            raise UserError("it has a view that reaches beyond its buffer; the file may be cut off")
        return content[start : start + length]

    def _buffer(self, index: int) -> bytes:
        if index not in self._buffers:
            buffer = item(self._document, "buffers", index)
            if "uri" in buffer:
                self._buffers[index] = self.resource(buffer["uri"])
            elif index == 0 and self._blob is not None:
                self._buffers[index] = self._blob
            else:
                raise UserError(f"its buffer {index} has no data; export it again")
        return self._buffers[index]

    def resource(self, uri: str) -> bytes:
        """What a uri stands for: the data in it, or a file beside the document.

        Raises UserError if there is no such file.
        """
        if uri.startswith("data:"):
            header, _, data = uri.partition(",")
            raw = unquote_to_bytes(data)
            return base64.b64decode(raw) if header.endswith(";base64") else raw
        path = find_beside(self._folder, uri)
        if path is None:
            raise UserError(f"{uri[:200]!r}, which it refers to, is not beside it; copy it there")
        return path.read_bytes()
