"""Small glTF files, written by hand, and the colour that a mesh in front of the camera is rendered in."""

import base64
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.data.procedural import AMBIENT, LIGHT
from recon_torch.views.cameras import orbit

COMPONENT_TYPES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}

SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)  # facing +Z, glTF's front
SQUARE_UV = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], np.float32)
SQUARE_FACES = np.array([0, 1, 2, 0, 2, 3], np.uint16)


class Gltf:
    """A document that grows: `add` puts an entry into a list of it, and returns its index."""

    def __init__(self):
        self.json = {"asset": {"version": "2.0"}}
        self.blob = b""

    def add(self, kind, **entry):
        self.json.setdefault(kind, []).append(entry)
        return len(self.json[kind]) - 1

    def view(self, content, **more):
        self.blob += bytes(-len(self.blob) % 4)
        index = self.add("bufferViews", buffer=0, byteOffset=len(self.blob), byteLength=len(content), **more)
        self.blob += content
        return index

    def array(self, array, dtype=None, **more):
        array = np.asarray(array, dtype)
        columns = array.reshape(len(array), -1)
        kind = COMPONENT_TYPES[array.dtype.str[1:]]
        view = self.view(columns.tobytes())
        return self.add(
            "accessors",
            bufferView=view,
            componentType=kind,
            count=len(array),
            type=TYPES[columns.shape[1]],
            **more,
        )

    def image(self, pixels, format="PNG", **save):
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, format, **save)
        return self.add("images", bufferView=self.view(buffer.getvalue()), mimeType=f"image/{format.lower()}")

    def texture(self, pixels, **sampler):
        entry = {"source": self.image(pixels)}
        if sampler:
            entry["sampler"] = self.add("samplers", **sampler)
        return self.add("textures", **entry)

    def square(self, material=None, transform=None, mesh=None, primitive=None, **attributes):
        """A node with the square [-1, 1]^2, with more attributes by name (accessors)."""
        entry = {
            "attributes": {"POSITION": self.array(SQUARE), **attributes},
            "indices": self.array(SQUARE_FACES),
            **(primitive or {}),
        }
        if material is not None:
            entry["material"] = self.add("materials", **material)
        index = self.add("meshes", primitives=[entry], **(mesh or {}))
        return self.add("nodes", mesh=index, **(transform or {}))

    def glb(self, path):
        document = dict(self.json)
        if self.blob:
            document["buffers"] = [{"byteLength": len(self.blob)}, *document.get("buffers", [])]
        text = json.dumps(document).encode()
        text += b" " * (-len(text) % 4)
        blob = self.blob + bytes(-len(self.blob) % 4)
        chunks = (
            struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(blob), b"BIN\0") + blob
        )
        path.write_bytes(b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks)
        return path

    def gltf(self, path, uri=None):
        """Writes text, with the data in it or, with a uri, nowhere."""
        data = uri or "data:application/octet-stream;base64," + base64.b64encode(self.blob).decode()
        buffers = [{"byteLength": len(self.blob), "uri": data}]
        path.write_text(json.dumps({**self.json, "buffers": buffers}))
        return path


@pytest.fixture
def gltf():
    return Gltf()


@pytest.fixture
def seen():
    """The RGBA of the centre of view 0, which a surface must face: in 0..255, with alpha in 0..1."""

    def see(path, lit=True):
        rgba, _ = mesh_rendering.render(load_mesh(path), orbit(1, 0.0, 9), supersampling=1)
        brightness = AMBIENT + (1 - AMBIENT) * LIGHT[0] if lit else 1.0
        return [*(rgba[0, 4, 4, :3] / brightness * 255), rgba[0, 4, 4, 3]]

    return see


def to_srgb(linear):
    """The sRGB curve in float64, with values in 0..255."""
    linear = np.clip(np.asarray(linear, np.float64), 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_linear(srgb):
    """The inverse of `to_srgb`."""
    srgb = np.asarray(srgb, np.float64) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@pytest.fixture
def curve():
    """The sRGB curve and its inverse."""
    return to_srgb, to_linear


@pytest.fixture
def square():
    """Positions, texture coordinates and indices of `Gltf.square`."""
    return SQUARE, SQUARE_UV, SQUARE_FACES
