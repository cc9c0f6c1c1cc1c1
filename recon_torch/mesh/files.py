"""Files of a textured surface for other tools: glTF, OBJ, PLY and USD, all with +Y up and in metres."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from recon_torch.mesh.extra import needed
from recon_torch.mesh.surface import Surface
from recon_torch.settings import MESH_PACKAGES, MeshFormat

ARRAY_BUFFER, ELEMENT_ARRAY_BUFFER = 34962, 34963  # of glTF
EXTRAS = {"units": "1 unit is 1 metre", "up": "+Y", "front": "+Z"}


class Textured(NamedTuple):
    """A surface as it is written: +Y up, the front towards +Z, one unit a metre.

    Attributes:
        surface: with a vertex for each chart that it is in.
        uvs: places in the texture; v grows downwards from the picture's upper edge.
        normals: unit vectors.
        texture: sRGB.
        whole: the same surface with each vertex once.
        colors: sRGB of its vertices.
    """

    surface: Surface
    uvs: Float[np.ndarray, "V 2"]
    normals: Float[np.ndarray, "V 3"]
    texture: UInt8[np.ndarray, "height width 3"]
    whole: Surface
    colors: UInt8[np.ndarray, "W 3"]


def write(mesh: Textured, directory: Path, formats: tuple[MeshFormat | str, ...]) -> list[str]:
    """Writes mesh.glb, ... and returns the names. Raises UserError for what is not installed."""
    names = []
    for each in dict.fromkeys(map(MeshFormat, formats)):
        names += WRITERS[each](mesh, directory)
    return list(dict.fromkeys(names))  # OBJ and USD share their picture


def check(formats: tuple[MeshFormat | str, ...]) -> None:
    """Raises UserError if what a format needs, or what any mesh needs, is not installed."""
    for module in MESH_PACKAGES:
        needed(module)
    if MeshFormat.USD in formats:
        needed("pxr", "export")


def _write_glb(mesh: Textured, directory: Path) -> list[str]:
    export = needed("trimesh.exchange.gltf").export_glb
    scene = needed("trimesh").Scene({"mesh": _unprocessed(mesh)})
    data = export(scene, include_normals=True, tree_postprocessor=_finish_tree)
    (directory / "mesh.glb").write_bytes(data)
    return ["mesh.glb"]


def _finish_tree(tree: dict[str, Any]) -> None:
    """Adds to trimesh's tree what it leaves out: the units, and what each buffer is for."""
    tree["asset"]["extras"] = EXTRAS
    indices = {each["indices"] for mesh in tree["meshes"] for each in mesh["primitives"]}
    for number, accessor in enumerate(tree["accessors"]):
        target = ELEMENT_ARRAY_BUFFER if number in indices else ARRAY_BUFFER
        tree["bufferViews"][accessor["bufferView"]]["target"] = target


def _write_obj(mesh: Textured, directory: Path) -> list[str]:
    surface, lines = (
        mesh.surface,
        ["# 1 unit is 1 metre; +Y is up, the front is towards +Z", "mtllib mesh.mtl"],
    )
    lines += ["v {:.7g} {:.7g} {:.7g}".format(*row) for row in surface.vertices]
    lines += [f"vt {u:.7g} {1 - v:.7g}" for u, v in mesh.uvs]
    lines += ["vn {:.6g} {:.6g} {:.6g}".format(*row) for row in mesh.normals]
    lines += ["usemtl texture"]
    lines += ["f {0}/{0}/{0} {1}/{1}/{1} {2}/{2}/{2}".format(*row) for row in surface.triangles + 1]
    material = "newmtl texture\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd mesh.png\n"
    (directory / "mesh.obj").write_text("\n".join(lines) + "\n")
    (directory / "mesh.mtl").write_text(material)
    Image.fromarray(mesh.texture).save(directory / "mesh.png")
    return ["mesh.obj", "mesh.mtl", "mesh.png"]


def _write_ply(mesh: Textured, directory: Path) -> list[str]:
    trimesh = needed("trimesh")
    whole = trimesh.Trimesh(
        mesh.whole.vertices,
        mesh.whole.triangles,
        vertex_normals=mesh.whole.normals(),
        vertex_colors=mesh.colors,
        process=False,
    )
    (directory / "mesh.ply").write_bytes(whole.export(file_type="ply", vertex_normal=True))
    return ["mesh.ply"]


def _write_usd(mesh: Textured, directory: Path) -> list[str]:
    """mesh.usdc with a UsdPreviewSurface, and its texture mesh.png beside it."""
    gf, sdf, usd, geom, shade, vt = (
        needed(f"pxr.{name}", "export") for name in ("Gf", "Sdf", "Usd", "UsdGeom", "UsdShade", "Vt")
    )
    Image.fromarray(mesh.texture).save(directory / "mesh.png")
    stage = usd.Stage.CreateNew(str(directory / "mesh.usdc"))
    geom.SetStageUpAxis(stage, geom.Tokens.y)
    geom.SetStageMetersPerUnit(stage, 1.0)
    root = geom.Xform.Define(stage, "/asset")
    stage.SetDefaultPrim(root.GetPrim())
    shape = geom.Mesh.Define(stage, "/asset/mesh")
    surface = mesh.surface
    shape.CreatePointsAttr(vt.Vec3fArray.FromNumpy(surface.vertices.astype(np.float32)))
    shape.CreateNormalsAttr(vt.Vec3fArray.FromNumpy(mesh.normals.astype(np.float32)))
    shape.SetNormalsInterpolation(geom.Tokens.vertex)
    shape.CreateFaceVertexCountsAttr(vt.IntArray.FromNumpy(np.full(len(surface.triangles), 3, np.int32)))
    shape.CreateFaceVertexIndicesAttr(vt.IntArray.FromNumpy(surface.triangles.ravel().astype(np.int32)))
    shape.CreateSubdivisionSchemeAttr(geom.Tokens.none)
    lower, upper = surface.vertices.min(0), surface.vertices.max(0)
    shape.CreateExtentAttr([gf.Vec3f(*lower.tolist()), gf.Vec3f(*upper.tolist())])
    places = mesh.uvs * [1, -1] + [0, 1]  # USD's v grows upwards
    coordinates = geom.PrimvarsAPI(shape).CreatePrimvar(
        "st", sdf.ValueTypeNames.TexCoord2fArray, geom.Tokens.vertex
    )
    coordinates.Set(vt.Vec2fArray.FromNumpy(np.ascontiguousarray(places, dtype=np.float32)))
    _bind_material(stage, shape, sdf, shade)
    stage.GetRootLayer().Save()
    return ["mesh.usdc", "mesh.png"]


def _bind_material(stage: Any, shape: Any, sdf: Any, shade: Any) -> None:
    kinds = sdf.ValueTypeNames
    material = shade.Material.Define(stage, "/asset/material")
    surface, texture, reader = (
        shade.Shader.Define(stage, f"/asset/material/{name}") for name in ("surface", "texture", "reader")
    )
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("roughness", kinds.Float).Set(1.0)
    surface.CreateInput("metallic", kinds.Float).Set(0.0)
    texture.CreateIdAttr("UsdUVTexture")
    texture.CreateInput("file", kinds.Asset).Set("./mesh.png")
    texture.CreateInput("sourceColorSpace", kinds.Token).Set("sRGB")
    reader.CreateIdAttr("UsdPrimvarReader_float2")
    reader.CreateInput("varname", kinds.String).Set("st")
    texture.CreateInput("st", kinds.Float2).ConnectToSource(reader.CreateOutput("result", kinds.Float2))
    surface.CreateInput("diffuseColor", kinds.Color3f).ConnectToSource(
        texture.CreateOutput("rgb", kinds.Float3)
    )
    material.CreateSurfaceOutput().ConnectToSource(surface.CreateOutput("surface", kinds.Token))
    shade.MaterialBindingAPI.Apply(shape.GetPrim()).Bind(material)


def _unprocessed(mesh: Textured) -> Any:
    """As trimesh holds it, whose v grows upwards."""
    trimesh = needed("trimesh")
    material = trimesh.visual.material.PBRMaterial(
        name="texture",
        baseColorTexture=Image.fromarray(mesh.texture),
        baseColorFactor=None,
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    visual = trimesh.visual.TextureVisuals(uv=mesh.uvs * [1, -1] + [0, 1], material=material)
    return trimesh.Trimesh(
        mesh.surface.vertices,
        mesh.surface.triangles,
        vertex_normals=mesh.normals,
        visual=visual,
        process=False,
    )


WRITERS: dict[MeshFormat, Callable[[Textured, Path], list[str]]] = {
    MeshFormat.GLB: _write_glb,
    MeshFormat.OBJ: _write_obj,
    MeshFormat.PLY: _write_ply,
    MeshFormat.USD: _write_usd,
}
