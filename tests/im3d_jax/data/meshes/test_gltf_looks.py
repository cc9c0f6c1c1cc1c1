"""Colours of glTF files against closed forms in float64: factors, COLOR_0, textures, alpha, emission."""

import io

import numpy as np
import pytest
from PIL import Image

from im3d_jax.data import mesh_rendering
from im3d_jax.data.meshes.parts import Texture, Wrap
from im3d_jax.data.meshes.reading import load_mesh
from im3d_jax.data.procedural import AMBIENT, LIGHT
from recon_torch.views.cameras import orbit

FACTOR = [0.8, 0.3, 0.01, 1.0]
TEXEL = [200, 120, 40]


def pbr(**pbr):
    return {"pbrMetallicRoughness": {"metallicFactor": 0, **pbr}}


def close(found, expected, atol=0.05):
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("value", [0.0, 0.002, 0.0031308, 0.01, 0.2, 1.0])
def test_factors_follow_the_srgb_curve(value, gltf, seen, curve, tmp_path):
    gltf.square(pbr(baseColorFactor=[value, value / 2, 1 - value, 1]))
    expected = curve[0]([value, value / 2, 1 - value])
    close(seen(gltf.glb(tmp_path / "a.glb")), [*expected, 1])


COLORS = {
    "float rgb": (np.array([0.5, 0.1, 0.02], np.float32), {}, [0.5, 0.1, 0.02]),
    "float rgba": (np.array([0.5, 0.1, 0.02, 0.3], np.float32), {}, [0.5, 0.1, 0.02]),
    "ubyte rgb": (np.array([128, 64, 5], np.uint8), {"normalized": True}, np.array([128, 64, 5]) / 255),
    "ushort rgba": (
        np.array([32768, 1000, 65535, 7], np.uint16),
        {"normalized": True},
        np.array([32768, 1000, 65535]) / 65535,
    ),
    "ubyte without its flag": (np.array([128, 64, 5, 255], np.uint8), {}, np.array([128, 64, 5]) / 255),
}


@pytest.mark.parametrize("kind", COLORS)
@pytest.mark.parametrize("with_material", [False, True])
def test_vertex_colours_are_linear(kind, with_material, gltf, seen, curve, tmp_path):
    stored, more, linear = COLORS[kind]
    color = gltf.array(np.tile(stored, (4, 1)), **more)
    gltf.square(pbr(baseColorFactor=FACTOR) if with_material else None, COLOR_0=color)
    expected = np.array(linear) * (FACTOR[:3] if with_material else 1)
    close(seen(gltf.glb(tmp_path / "a.glb")), [*curve[0](expected), 1])


def test_texture_factor_and_vertex_colour_are_multiplied(gltf, seen, curve, square, tmp_path):
    texture = gltf.texture(np.full((2, 2, 3), TEXEL))
    gltf.square(
        pbr(baseColorFactor=FACTOR, baseColorTexture={"index": texture}),
        TEXCOORD_0=gltf.array(square[1]),
        COLOR_0=gltf.array(np.full((4, 3), 0.5), np.float32),
    )
    close(seen(gltf.glb(tmp_path / "a.glb")), [*curve[0](curve[1](TEXEL) * FACTOR[:3] * 0.5), 1])


def test_specular_glossiness_shows_its_diffuse_colour(gltf, seen, curve, square, tmp_path):
    texture = gltf.texture(np.full((2, 2, 3), TEXEL))
    extension = {"diffuseFactor": FACTOR, "diffuseTexture": {"index": texture}}
    material = {"extensions": {"KHR_materials_pbrSpecularGlossiness": extension}}
    gltf.square({**material, **pbr(baseColorFactor=[0, 0, 0, 1])}, TEXCOORD_0=gltf.array(square[1]))
    close(seen(gltf.glb(tmp_path / "a.glb")), [*curve[0](curve[1](TEXEL) * FACTOR[:3]), 1])
    assert load_mesh(tmp_path / "a.glb").left_out == ("specular colour and glossiness",)


def test_emission_is_added_and_unlit_is_not_shaded(gltf, seen, curve, square, tmp_path):
    brightness = AMBIENT + (1 - AMBIENT) * LIGHT[0]
    texture = gltf.texture(np.full((2, 2, 3), TEXEL))
    strength = {"KHR_materials_emissive_strength": {"emissiveStrength": 2.0}}
    material = {
        **pbr(baseColorFactor=[0.1, 0.1, 0.1, 1]),
        "emissiveFactor": [0.5, 0.25, 0.0],
        "emissiveTexture": {"index": texture, "texCoord": 1},
        "extensions": strength,
    }
    gltf.square(material, TEXCOORD_1=gltf.array(square[1]))
    lit = curve[1](curve[0](0.1) * brightness)
    expected = curve[0](lit + 2 * np.array([0.5, 0.25, 0.0]) * curve[1](TEXEL))
    close(seen(gltf.glb(tmp_path / "a.glb"), lit=False), [*expected, 1])
    gltf.json["materials"][0]["extensions"] = {"KHR_materials_unlit": {}}
    close(seen(gltf.glb(tmp_path / "b.glb"), lit=False), [*curve[0]([0.1] * 3), 1])


# ---- Texture coordinates ----

QUARTERS = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]])  # upper row first
NEAREST = {"magFilter": 9728}


def quarter(uv):
    """The colour of QUARTERS at a place, repeated."""
    u, v = np.floor(np.asarray(uv) * 2).astype(int) % 2
    return QUARTERS[v, u]


TRANSFORMS = {
    "offset": {"offset": [0.5, 0]},
    "scale": {"scale": [0.3, 0.8], "offset": [0.1, 0.6]},
    "rotation": {"rotation": np.pi / 2, "scale": [0.9, 0.6]},
    "all": {"rotation": 0.7, "scale": [0.7, 1.9], "offset": [0.3, -0.2]},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_texture_transforms(name, gltf, seen, tmp_path):
    transform = {"rotation": 0.0, "scale": [1, 1], "offset": [0, 0], **TRANSFORMS[name]}
    for number, place in enumerate([(0.3, 0.2), (0.7, 0.4), (0.2, 0.9)]):
        document = type(gltf)()
        texture = {"index": document.texture(QUARTERS, **NEAREST)}
        texture["extensions"] = {"KHR_texture_transform": {**transform, "texCoord": 1}}
        zero = document.array(np.zeros((4, 2)), np.float32)
        uv = document.array(np.tile(place, (4, 1)), np.float32)
        document.square(pbr(baseColorTexture=texture), TEXCOORD_0=zero, TEXCOORD_1=uv)
        (u, v), angle = np.array(place) * transform["scale"], transform["rotation"]
        # Counter-clockwise as one looks at the picture, whose v grows downwards.
        turned = [np.cos(angle) * u + np.sin(angle) * v, -np.sin(angle) * u + np.cos(angle) * v]
        found = seen(document.glb(tmp_path / f"{number}.glb"))
        close(found[:3], quarter(np.array(turned) + transform["offset"]))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_normalised_and_second_texture_coordinates(dtype, gltf, seen, tmp_path):
    largest = np.iinfo(dtype).max
    uv = gltf.array(np.tile([0.75 * largest, 0.25 * largest], (4, 1)), dtype, normalized=True)
    other = gltf.array(np.zeros((4, 2)), np.float32)
    texture = {"index": gltf.texture(QUARTERS, **NEAREST), "texCoord": 1}
    gltf.square(pbr(baseColorTexture=texture), TEXCOORD_0=other, TEXCOORD_1=uv)
    close(seen(gltf.glb(tmp_path / "a.glb"))[:3], QUARTERS[0, 1])


def test_textures_without_coordinates_are_named(gltf, seen, curve, tmp_path):
    gltf.square(pbr(baseColorFactor=FACTOR, baseColorTexture={"index": gltf.texture(QUARTERS)}))
    close(seen(gltf.glb(tmp_path / "a.glb")), [*curve[0](FACTOR[:3]), 1])
    assert load_mesh(tmp_path / "a.glb").left_out == ("texture without coordinates: TEXCOORD_0",)


WRAPS = {Wrap.REPEAT: 10497, Wrap.CLAMP: 33071, Wrap.MIRROR: 33648}


def wrapped(index, size, wrap):
    """One texel after the other, by counting."""
    if wrap == Wrap.CLAMP:
        return min(max(index, 0), size - 1)
    if wrap == Wrap.REPEAT:
        return index - size * (index // size)
    pattern = [*range(size), *reversed(range(size))]
    return pattern[index % len(pattern)]


@pytest.mark.parametrize("wrap_u", WRAPS)
@pytest.mark.parametrize("wrap_v", WRAPS)
@pytest.mark.parametrize("with_alpha", [False, True])
def test_wrap_modes_and_bilinear_samples(wrap_u, wrap_v, with_alpha, curve):
    """A loop over four texels in float64, of linear colours, which alpha weights where it counts."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 5, 4), np.uint8)
    uv = rng.uniform(-2.5, 2.5, (200, 2)).astype(np.float32)
    texels = np.concatenate([curve[1](pixels[..., :3]), pixels[..., 3:] / 255], -1)
    expected = []
    for u, v in uv.astype(np.float64):
        x, y = u * 5 - 0.5, v * 3 - 0.5
        total, colors = 0, 0
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                weight = (1 - abs(x - column)) * (1 - abs(y - row))
                texel = texels[wrapped(row, 3, wrap_v), wrapped(column, 5, wrap_u)]
                total, colors = total + weight * texel, colors + weight * texel[3] * texel[:3]
        expected.append([*colors / total[3], total[3]] if with_alpha else total)
    found = mesh_rendering.sample(Texture(pixels, (wrap_u, wrap_v)), uv, with_alpha)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_samplers_of_files(gltf, tmp_path, square):
    sampler = {"wrapS": 33648, "wrapT": 33071, "magFilter": 9728}
    texture = gltf.texture(QUARTERS, **sampler)
    gltf.square(pbr(baseColorTexture={"index": texture}), TEXCOORD_0=gltf.array(square[1]))
    (texture,) = load_mesh(gltf.glb(tmp_path / "a.glb")).textures
    assert texture.wrap == (Wrap.MIRROR, Wrap.CLAMP) and texture.nearest
    np.testing.assert_array_equal(texture.pixels[..., :3], QUARTERS)


# ---- Alpha ----


def behind(gltf, color):
    """An opaque square behind all others."""
    gltf.square(pbr(baseColorFactor=[*color, 1]), {"translation": [0, 0, -0.5]})


def front_view(path, background=0.0):
    rgba, depth = mesh_rendering.render(load_mesh(path), orbit(1, 0.0, 9), supersampling=1)
    return rgba[0, 4, 4].astype(np.float64), depth[0, 4, 4, 0]


@pytest.mark.parametrize("source", ["factor", "texture", "colour", "all"])
def test_blend_lets_through_what_is_behind(source, gltf, curve, square, tmp_path):
    """Front to back: two panes before a wall, composited on sRGB values after the light."""
    alpha, attributes, info = 1.0, {}, {}
    if source in ("factor", "all"):
        info["baseColorFactor"], alpha = [1, 1, 1, 0.5], alpha * 0.5
    if source in ("texture", "all"):
        texture = gltf.texture(np.full((2, 2, 4), [255, 255, 255, 102]))
        info["baseColorTexture"], alpha = {"index": texture}, alpha * 0.4
        attributes["TEXCOORD_0"] = gltf.array(square[1])
    if source in ("colour", "all"):
        attributes["COLOR_0"], alpha = gltf.array(np.full((4, 4), [1, 1, 1, 0.75]), np.float32), alpha * 0.75
    for z in (0.0, 0.25):
        gltf.square({**pbr(**info), "alphaMode": "BLEND"}, {"translation": [0, 0, z]}, **attributes)
    panes, _ = front_view(gltf.glb(tmp_path / "panes.glb"))
    brightness = AMBIENT + (1 - AMBIENT) * LIGHT[0]
    covered = 1 - (1 - alpha) ** 2
    np.testing.assert_allclose(panes, [*[brightness] * 3, covered], atol=2e-4)
    behind(gltf, [0.2, 0.0, 0.0])
    walled, depth = front_view(gltf.glb(tmp_path / "walled.glb"))
    wall = np.array([curve[0](0.2), 0, 0]) / 255
    expected = brightness * (covered + (1 - covered) * wall)
    np.testing.assert_allclose(walled, [*expected, 1], atol=2e-4)
    mesh = load_mesh(tmp_path / "walled.glb")
    places = np.unique(mesh.corners[..., 0])[::-1].astype(np.float64)  # pane, pane, wall; the camera is at +X
    weights = np.array([alpha, alpha * (1 - alpha), (1 - alpha) ** 2])
    assert depth == pytest.approx(weights @ (2 - places), abs=1e-4)


@pytest.mark.parametrize(
    "alpha, cutoff, visible", [(0.49, None, False), (0.51, None, True), (0.2, 0.1, True)]
)
def test_mask_cuts_out(alpha, cutoff, visible, gltf, curve, tmp_path):
    material = {**pbr(baseColorFactor=[0, 1, 0, alpha]), "alphaMode": "MASK"}
    material |= {} if cutoff is None else {"alphaCutoff": cutoff}
    gltf.square(material)
    behind(gltf, [1, 0, 0])
    rgba, _ = front_view(gltf.glb(tmp_path / "a.glb"))
    brightness = AMBIENT + (1 - AMBIENT) * LIGHT[0]
    np.testing.assert_allclose(rgba / [*[brightness] * 3, 1], [not visible, visible, 0, 1], atol=2e-4)


def test_opaque_materials_ignore_alpha(gltf, seen, tmp_path):
    gltf.square(pbr(baseColorFactor=[1, 1, 1, 0.1]))
    close(seen(gltf.glb(tmp_path / "a.glb")), [255, 255, 255, 1])


def test_decals_lie_before_what_they_coincide_with(gltf, seen, tmp_path):
    gltf.square({**pbr(baseColorFactor=[0, 1, 0, 1]), "alphaMode": "BLEND"})
    gltf.square(pbr(baseColorFactor=[1, 0, 0, 1]))
    close(seen(gltf.glb(tmp_path / "a.glb")), [0, 255, 0, 1])


def test_many_layers_are_passed(gltf, tmp_path):
    """A stack of invisible cut-outs hides nothing; rays graze some of its edges."""
    for z in np.linspace(0, 0.4, 40):
        gltf.square({**pbr(baseColorFactor=[1, 1, 1, 0]), "alphaMode": "MASK"}, {"translation": [0, 0, z]})
    behind(gltf, [1, 1, 1])
    rgba, _ = mesh_rendering.render(load_mesh(gltf.glb(tmp_path / "a.glb")), orbit(1, 0.0, 33))
    mesh = load_mesh(gltf.glb(tmp_path / "b.glb"))
    wall = mesh._replace(
        **{
            name: getattr(mesh, name)[~mesh.see_through]
            for name in ("corners", "normals", "colors", "uvs", "emission_uvs", "material_index")
        }
    )
    expected, _ = mesh_rendering.render(wall, orbit(1, 0.0, 33))
    np.testing.assert_allclose(rgba, expected, atol=1e-6)


# ---- Pictures ----


def encoded(pixels, format, **save):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, format, **save)
    return buffer.getvalue()


def test_webp_beside_a_fallback(gltf, seen, square, tmp_path):
    webp = gltf.image(np.full((4, 4, 3), TEXEL), "WEBP", lossless=True)
    fallback = gltf.image(np.full((4, 4, 3), 9))
    extension = {"EXT_texture_webp": {"source": webp}}
    texture = gltf.add("textures", source=fallback, extensions=extension)
    gltf.square(pbr(baseColorTexture={"index": texture}), TEXCOORD_0=gltf.array(square[1]))
    gltf.json["extensionsRequired"] = gltf.json["extensionsUsed"] = ["EXT_texture_webp"]
    close(seen(gltf.glb(tmp_path / "a.glb")), [*TEXEL, 1])


def test_ktx2_is_refused_by_name_unless_there_is_a_fallback(gltf, seen, square, tmp_path, user_error):
    extension = {"KHR_texture_basisu": {"source": gltf.add("images", uri="wood.ktx2")}}
    texture = gltf.add("textures", extensions=extension)
    gltf.square(pbr(baseColorTexture={"index": texture}), TEXCOORD_0=gltf.array(square[1]))
    with user_error("cannot read .*a.glb: it needs KHR_texture_basisu, which is not read"):
        load_mesh(gltf.glb(tmp_path / "a.glb"))
    gltf.json["textures"][0]["source"] = gltf.image(np.full((4, 4, 3), TEXEL))
    close(seen(gltf.glb(tmp_path / "b.glb")), [*TEXEL, 1])
    gltf.json["textures"][0] = {"source": gltf.add("images", uri="wood.png")}
    (tmp_path / "wood.png").write_bytes(b"\xabKTX 20\xbb\r\n\x1a\n" + bytes(100))
    with user_error("KHR_texture_basisu"):
        load_mesh(gltf.glb(tmp_path / "c.glb"))


@pytest.mark.parametrize(
    "uri, file",
    [
        ("my%20wood%20gl%C3%A4nzend.png", "my wood glänzend.png"),
        ("my%20wood.png", "my%20wood.png"),
        ("textures\\wood.png", "textures/wood.png"),
        ("Textures/Wood.PNG", "textures/wood.png"),
        ("C:\\Users\\anna\\wood.png", "wood.png"),
        ("/home/anna/wood.png", "textures/wood.png"),
        ("../wood.png", "../wood.png"),
    ],
)
def test_external_textures_are_found(uri, file, gltf, seen, square, tmp_path):
    folder = tmp_path / "meshes"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes(encoded(np.full((4, 4, 3), TEXEL), "PNG"))
    texture = gltf.add("textures", source=gltf.add("images", uri=uri))
    gltf.square(pbr(baseColorTexture={"index": texture}), TEXCOORD_0=gltf.array(square[1]))
    close(seen(gltf.glb(folder / "a.glb")), [*TEXEL, 1])


@pytest.mark.parametrize("uri", ["x" * 5000 + ".png", "a\0b.png", "https://example.org/wood.png", ""])
def test_names_that_no_file_can_have_are_named_as_missing(uri, gltf, square, tmp_path):
    texture = gltf.add("textures", source=gltf.add("images", uri=uri))
    gltf.square(pbr(baseColorTexture={"index": texture}), TEXCOORD_0=gltf.array(square[1]))
    assert load_mesh(gltf.glb(tmp_path / "a.glb")).left_out == (f"missing texture: {uri[:200]}",)


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_missing_and_broken_textures_are_named(content, gltf, seen, curve, square, tmp_path):
    if content:
        (tmp_path / "wood.png").write_bytes(content)
    texture = gltf.add("textures", source=gltf.add("images", uri="wood.png"))
    material = pbr(baseColorFactor=FACTOR, baseColorTexture={"index": texture})
    gltf.square(material, TEXCOORD_0=gltf.array(square[1]))
    close(seen(gltf.glb(tmp_path / "a.glb")), [*curve[0](FACTOR[:3]), 1])
    expected = f"{'unreadable' if content else 'missing'} texture: wood.png"
    assert load_mesh(tmp_path / "a.glb").left_out == (expected,)


PICTURES = {
    "L": (Image.new("L", (2, 2), 77), [77, 77, 77, 255]),
    "LA": (Image.new("LA", (2, 2), (77, 30)), [77, 77, 77, 30]),
    "16 bits": (Image.fromarray(np.full((2, 2), 77 * 257 + 3, np.uint16)), [77, 77, 77, 255]),
    "palette": (
        Image.new("RGB", (2, 2), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
        [10, 20, 30, 255],
    ),
    "1 bit": (Image.new("1", (2, 2), 1), [255, 255, 255, 255]),
}


@pytest.mark.parametrize("mode", PICTURES)
def test_pictures_of_all_modes(mode, gltf, square, tmp_path):
    picture, rgba = PICTURES[mode]
    picture.save(tmp_path / "a.png")
    texture = gltf.add("textures", source=gltf.add("images", uri="a.png"))
    gltf.square(pbr(baseColorTexture={"index": texture}), TEXCOORD_0=gltf.array(square[1]))
    (texture,) = load_mesh(gltf.glb(tmp_path / "a.glb")).textures
    np.testing.assert_array_equal(texture.pixels, np.tile(np.array(rgba, np.uint8), (2, 2, 1)))


def test_what_is_left_out_is_named(gltf, square, tmp_path):
    texture = {"index": gltf.texture(QUARTERS)}
    material = {
        "pbrMetallicRoughness": {"roughnessFactor": 0.5},
        "normalTexture": texture,
        "occlusionTexture": texture,
        "extensions": {"KHR_materials_clearcoat": {"clearcoatFactor": 1.0}},
    }
    gltf.square(material, TEXCOORD_0=gltf.array(square[1]))
    gltf.json["extensionsUsed"] = ["KHR_materials_clearcoat", "KHR_texture_transform"]
    gltf.add("animations", channels=[], samplers=[])
    names = ("KHR_materials_clearcoat", "animation", "metalness", "normal map", "occlusion map", "roughness")
    assert load_mesh(gltf.glb(tmp_path / "a.glb")).left_out == names


def test_an_extension_that_only_the_material_names_is_named_too(gltf, tmp_path):
    gltf.square({"extensions": {"KHR_materials_transmission": {"transmissionFactor": 1}}})
    assert "KHR_materials_transmission" in load_mesh(gltf.glb(tmp_path / "a.glb")).left_out


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl"])
def test_a_pointer_in_the_place_of_a_mesh_is_named(suffix, tmp_path, user_error):
    path = tmp_path / f"a.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with user_error("it is a git-lfs pointer"):
        load_mesh(path)
