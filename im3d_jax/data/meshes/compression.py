"""Geometry that glTF files hold compressed, decoded by the wheels of Draco and meshoptimizer.

Both are of the extra `meshes`, and are imported when a file needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8, UInt32

from recon_torch.errors import UserError, first_line

DRACO = "KHR_draco_mesh_compression"
MESHOPT = ("KHR_meshopt_compression", "EXT_meshopt_compression")
INSTALL = "pip install 'im3d[meshes]'"


class NoDecoder(UserError):
    """The wheel that decodes a file is not installed."""


def decode_draco(
    content: bytes, attributes: Mapping[str, int]
) -> tuple[UInt32[np.ndarray, "F 3"], dict[str, Num[np.ndarray, "V components"]]]:
    """The triangles and attributes of a compressed primitive.

    Args:
        attributes: the number in Draco's data of each attribute.

    Raises:
        NoDecoder: DracoPy is not installed.
        UserError: the data are broken, or lack an attribute.
    """
    draco = _import("DracoPy", DRACO)
    try:
        decoded = draco.decode(content)
        found = {entry["unique_id"]: entry["data"] for entry in decoded.attributes}
        arrays = {name: np.asarray(found[number]) for name, number in attributes.items()}
        faces = np.asarray(decoded.faces, np.uint32).reshape(-1, 3)
    except Exception as error:  # DracoPy's own exceptions share no base
        raise UserError(f"its {DRACO} data cannot be decoded ({first_line(error, 200)})") from error
    return faces, {name: array.reshape(len(array), -1) for name, array in arrays.items()}


def decode_meshopt(content: bytes, extension: Mapping[str, Any], name: str) -> UInt8[np.ndarray, "bytes"]:
    """The bytes of a compressed buffer view.

    Args:
        extension: the object of the extension, with count, byteStride, mode and filter.
        name: of the extension.

    Raises:
        NoDecoder: meshoptimizer is not installed.
        UserError: the data are broken, or in a mode or filter that is not known.
    """
    meshopt = _import("meshoptimizer", name)
    count, stride, mode = extension["count"], extension["byteStride"], extension["mode"]
    try:
        if mode == "ATTRIBUTES":
            element = np.dtype((np.uint8, (stride,)))  # which makes room for `stride` bytes an element
            decoded = meshopt.decode_vertex_buffer(count, stride, content, element)
            return _unfiltered(meshopt, decoded, extension.get("filter", "NONE")).reshape(-1)
        if stride not in (2, 4):
            raise ValueError(f"indices of {stride} bytes")
        # The wheel's decoders write four bytes an index only if they are told so.
        decode = {"TRIANGLES": meshopt.decode_index_buffer, "INDICES": meshopt.decode_index_sequence}[mode]
        return decode(count, 4, content).astype(f"<u{stride}").view(np.uint8)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"its {name} data cannot be decoded ({first_line(error, 200)})") from error


def _unfiltered(
    meshopt: ModuleType, decoded: UInt8[np.ndarray, "count stride"], name: str
) -> UInt8[np.ndarray, "count stride"]:
    count, stride = decoded.shape
    if name == "NONE":
        return decoded
    if name == "COLOR":
        return _decode_color(decoded)
    filters = {
        "OCTAHEDRAL": meshopt.decode_filter_oct,
        "QUATERNION": meshopt.decode_filter_quat,
        "EXPONENTIAL": meshopt.decode_filter_exp,
    }
    return filters[name](decoded, count, stride)


def _decode_color(decoded: UInt8[np.ndarray, "count stride"]) -> UInt8[np.ndarray, "count stride"]:
    """The COLOR filter of KHR_meshopt_compression, which the wheel does not have: YCoCg with alpha to RGBA.

    The highest set bit of alpha's code says how many bits each component has.
    """
    signed, largest = {4: (np.int8, 255), 8: (np.int16, 65535)}[decoded.shape[1]]
    values = np.ascontiguousarray(decoded).view(signed).astype(np.int64)
    luma, orange, green = values[:, 0], values[:, 1], values[:, 2]
    alpha_code = np.ascontiguousarray(decoded).view(f"u{np.dtype(signed).itemsize}")[:, 3].astype(np.int64)
    luma = luma & largest
    top = np.frexp(np.maximum(alpha_code, 1).astype(np.float64))[1] - 1  # the index of the highest set bit
    scale = (1 << (top + 1)) - 1
    below = luma - green
    rgb = np.stack([below + orange, luma + green, below - orange], -1)
    alpha = ((alpha_code << 1) & scale) | (alpha_code & 1)
    rgba = np.concatenate([rgb, alpha[:, None]], -1)
    full = np.clip(np.floor(rgba * largest / scale[:, None] + 0.5), 0, largest)
    return full.astype(f"<u{np.dtype(signed).itemsize}").view(np.uint8)


def _import(module: str, extension: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise NoDecoder(f"it needs {extension}: {INSTALL}") from None
