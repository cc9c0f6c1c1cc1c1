"""The layouts that known methods write by default, each with where in its public code that can be read.

`fields` are those of `layouts.Layout`. Methods that write one fixed name into the working directory, such as
sample.png, are expected in a folder for each object, or under the object's name. Azimuths are in the order of
the views; in which sense a method turns was not checked against its renders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A method's outputs. source: repository: paths in it; note: what to know."""

    fields: Mapping[str, Any]
    source: str
    note: str = ""


THREESTUDIO = {
    "kind": "images",
    "path": ("{prompt}@*/save/it{step}-test/{view}.png", "{prompt}/save/it{step}-test/{view}.png"),
    "square": True,
    "elevations_deg": (15.0,),
}
"""A trial of threestudio is called after its prompt, with the time at its end. Each picture has the render,
then its normals and opacity."""

STRIP = {"kind": "grid", "grid": (3, 4), "tiles": (0, 1, 2, 3), "shows": "views"}
"""Three samples below each other, of four views each; the first sample is taken."""

PRESETS: dict[str, Preset] = {
    "mvdream": Preset(
        {**STRIP, "path": ("{prompt}.png", "{prompt}/sample.png"), "elevations_deg": (15.0,)},
        "bytedance/MVDream: scripts/t2i.py, mvdream/camera_utils.py",
        "it writes sample.png; the first of its three samples is taken",
    ),
    "mvdream-threestudio": Preset(
        {**THREESTUDIO, "fov_deg": 40.0},
        "bytedance/MVDream-threestudio: configs/mvdream-sd21.yaml, threestudio/systems/mvdream.py",
        "DIR is outputs/mvdream-sd21-rescale0.5",
    ),
    "imagedream": Preset(
        {
            **STRIP,
            "path": ("{name}_pixel_dream.png", "{name}_local_dream.png"),
            "elevations_deg": (5.0,),
        },
        "bytedance/ImageDream: extern/ImageDream/scripts/demo.py",
        "the first of its three samples is taken, and the fifth view of the mode pixel is not in the file",
    ),
    "imagedream-threestudio": Preset(
        {**THREESTUDIO, "fov_deg": 40.0},
        "bytedance/ImageDream: configs/imagedream-sd21-shading.yaml, threestudio/systems/imagedream.py",
        "DIR is outputs/imagedream-sd21-shading",
    ),
    "threestudio": Preset(
        THREESTUDIO,
        "threestudio-project/threestudio: threestudio/systems/dreamfusion.py, threestudio/data/uncond.py,"
        " threestudio/utils/config.py",
        "DIR is outputs/NAME of a config; where a config's tag is no prompt (zero123, magic123), give a path",
    ),
    "magic123": Preset(
        {
            "kind": "video",
            "path": ("magic123_{name}_*_*/results/*_ep{step}_lambertian.mp4",),
            "elevations_deg": (0.0,),
            "fov_deg": 40.0,
        },
        "guochengqian/Magic123: scripts/magic123/run_both_priors.sh, nerf/utils.py, main.py",
        "DIR is out/magic123-RUN-RUN2/DATASET; the pictures are stretched to the full range of grey levels",
    ),
    "zero123": Preset(
        {
            "kind": "images",
            "path": ("scene-{name}-index-*/test_{step}/img/step_{view}.png",),
            "fov_deg": 49.1,
        },
        "cvlab-columbia/zero123: 3drec/run_zero123.py, 3drec/pose.py, 3drec/my/utils/event.py",
        "DIR is the folder exp; 100 views on a spiral from the top to the equator, so of many elevations",
    ),
    "zero123plus": Preset(
        {
            "kind": "grid",
            "path": ("{name}.png", "{name}/output.png"),
            "grid": (3, 2),
            "shows": "views",
            "azimuths_deg": (30.0, 90.0, 150.0, 210.0, 270.0, 330.0),
            "elevations_deg": (30.0, -20.0, 30.0, -20.0, 30.0, -20.0),
        },
        "SUDO-AI-3D/zero123plus: README.md, examples/img_to_mv.py",
        "on grey; elevations are those of version 1.1",
    ),
    "syncdreamer": Preset(
        {
            "kind": "grid",
            "path": ("{name}/{seed}.png",),
            "grid": (1, 16),
            "shows": "views",
            "elevations_deg": (30.0,),
        },
        "liuyuan-pal/SyncDreamer: generate.py, ldm/models/diffusion/sync_dreamer.py",
        "DIR has a folder for each --output; the first of its samples is taken",
    ),
    "openlrm": Preset(
        {
            "kind": "video",
            "path": ("videos/{name}.mov", "{name}.mov"),
            "elevations_deg": (23.578,),
            "fov_deg": 67.38,
        },
        "3DTopia/OpenLRM: openlrm/runners/infer/lrm.py, openlrm/datasets/cam_utils.py",
        "DIR is dumps/MODEL",
    ),
    "openlrm-mesh": Preset(
        {"kind": "mesh", "path": ("meshes/{name}.ply", "{name}.ply"), "up": "z"},
        "3DTopia/OpenLRM: openlrm/runners/infer/lrm.py",
        "DIR is dumps/MODEL",
    ),
    "one-2-3-45": Preset(
        {"kind": "mesh", "path": ("{name}/mesh.glb", "{name}/mesh.obj"), "up": "y"},
        "One-2-3-45/One-2-3-45: run.py, utils/utils.py",
        "DIR is exp; make the mesh with --output_format .glb, as its mesh.ply is mirrored and has z up",
    ),
    "one-2-3-45-views": Preset(
        {"kind": "images", "path": ("{name}/stage1_8/{view}.png",), "num_views": 8, "shows": "views"},
        "One-2-3-45/One-2-3-45: run.py, utils/zero123_utils.py",
        "DIR is exp; four views at the elevation of the input, and four 30 degrees above or below it",
    ),
    "sv3d": Preset(
        {
            "kind": "video",
            "path": ("{index}.mp4",),
            "picture": "{index}.jpg",
            "num_views": 21,
            "shows": "views",
            "azimuths_deg": tuple(round(360 / 21 * (view + 1), 6) % 360 for view in range(21)),
            "elevations_deg": (10.0,),
        },
        "Stability-AI/generative-models: scripts/sampling/simple_video_sample.py",
        "files are numbered in the order of the inputs' names, which is to be that of the list of prompts;"
        " the last view is the input; the elevation is that of sv3d_p, while sv3d_u keeps that of the input",
    ),
    "trellis": Preset(
        {"kind": "mesh", "path": ("{name}/sample.glb", "{name}.glb"), "up": "y"},
        "microsoft/TRELLIS: example.py",
        "it writes sample.glb",
    ),
    "trellis-gaussians": Preset(
        {"kind": "gaussians", "path": ("{name}/sample.ply", "{name}.ply"), "up": "-y"},
        "microsoft/TRELLIS: example.py, trellis/representations/gaussian/gaussian_model.py",
        "it writes sample.ply",
    ),
    "hunyuan3d-2": Preset(
        {
            "kind": "mesh",
            "path": ("{name}/textured_mesh.glb", "{name}.glb", "{name}/demo.glb", "{name}/white_mesh.glb"),
            "up": "y",
        },
        "Tencent-Hunyuan/Hunyuan3D-2: gradio_app.py, minimal_demo.py",
        "a mesh without a texture is grey",
    ),
}
