"""The contract of a `Scene` as checks that run on any scene, also on one of your own.

    for check in conformance.CHECKS:
        check(lambda cameras: MyScene(cameras))

Each check makes scenes for the cameras that it names, and raises AssertionError with a sentence about what
is wrong. Scenes made for the same cameras must be equal.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recon_torch.raster import Render
from recon_torch.scene import Scene
from recon_torch.views.cameras import Cameras, orbit
from recon_torch.views.world import World

MakeScene = Callable[[Cameras], Scene]

CAMERAS = orbit(3, 0.3, 32)
SEED = 5


def has_all_members(make: MakeScene) -> None:
    """It has the members of the protocol, and a positive learning rate for each parameter."""
    scene = make(CAMERAS)
    assert isinstance(scene, Scene), "it lacks members of the Scene protocol"
    for progress in (0.0, 1.0):
        rates = scene.rates(progress)
        assert rates.keys() == scene.parameters.tensors.keys(), "rates() does not name all parameters"
        assert all(rate > 0 for rate in rates.values()), "a learning rate is not positive"
    assert scene.num_gaussians >= 0, "num_gaussians is negative"


def renders_images(make: MakeScene) -> None:
    """Renders fit the cameras, have finite colours and an opacity in [0, 1], and repeat themselves."""
    scene = make(CAMERAS)
    first, again = (_render(scene) for _ in range(2))
    shape = (len(CAMERAS), CAMERAS.height, CAMERAS.width)
    for image, channels in ((first.rgb, 3), (first.alpha, 1), (first.depth, 1)):
        assert image.shape == (*shape, channels), f"a render has shape {tuple(image.shape)}"
        assert image.isfinite().all(), "a render is not finite"
    assert first.alpha.min() >= 0 and first.alpha.max() <= 1, "an opacity is not in [0, 1]"
    assert first.alpha.max() > 0, "a new scene shows nothing, so that nothing can be learned from it"
    assert torch.equal(first.rgb, again.rgb), "two renders without a seed differ"


def renders_several_as_each_alone(make: MakeScene) -> None:
    """Scenes that are rendered together look as they do alone."""
    scenes, rigs = [make(CAMERAS), make(CAMERAS)], [CAMERAS[:2], CAMERAS[1:]]
    step(scenes[1], 0)
    together = scenes[0].render_together(scenes, rigs, [SEED, SEED])
    for scene, rig, render in zip(scenes, rigs, together, strict=True):
        (alone,) = scene.render_together([scene], [rig], [SEED])
        assert torch.allclose(render.rgb, alone.rgb, atol=1e-4), "a scene looks different among others"


def adds_a_finite_penalty(make: MakeScene) -> None:
    """What a scene adds to the loss is one finite number."""
    scene = make(CAMERAS)
    (render,) = scene.render_together([scene], [CAMERAS], [SEED])
    penalty = torch.as_tensor(scene.penalty(render.info))
    assert penalty.shape == () and penalty.isfinite(), f"the penalty is {penalty}"


def learns_from_its_renders(make: MakeScene) -> None:
    """Steps against a dark target make the renders darker, and leave everything finite."""
    scene = make(CAMERAS)
    before = _brightness(scene)
    for number in range(5):
        step(scene, number)
    assert scene.parameters.is_finite(), "parameters are not finite after some steps"
    assert _brightness(scene) < before, "steps along the gradient do not change what is rendered"


def repeats_a_step_with_its_seed(make: MakeScene) -> None:
    """The same steps with the same seeds give the same bytes, whatever the global generator is at."""
    first, second = make(CAMERAS), make(CAMERAS)
    for number in range(2):
        step(first, number)
        torch.rand(7)
        step(second, number)
    assert equal(first, second), "the same seeds give other parameters: something is drawn elsewhere"


def goes_on_from_its_state(make: MakeScene) -> None:
    """A state survives a file that is read without pickle, is no view of the scene, and continues exactly."""
    scene, other = make(CAMERAS), make(CAMERAS)
    step(scene, 0)
    file = io.BytesIO()
    torch.save(scene.state_dict(), file)
    state = scene.state_dict()
    step(scene, 1)
    file.seek(0)
    for saved in (state, torch.load(file, weights_only=True)):
        other.load_state_dict({**saved, "of the fit": 1})
        step(other, 1)
        assert equal(scene, other), "a restored scene does not go on as the one that was saved"


def keeps_to_a_limit(make: MakeScene) -> None:
    """After `limit` a scene has no more Gaussians than that, and can still be rendered and fitted."""
    scene = make(CAMERAS)
    limit = max(scene.num_gaussians // 2, 1)
    scene.limit(limit)
    step(scene, 0)
    assert scene.num_gaussians <= limit, f"it has {scene.num_gaussians} Gaussians after limit({limit})"
    assert _render(scene).rgb.isfinite().all(), "a render is not finite after limit()"


def starts_on_masks(make: MakeScene) -> None:
    """`start_on` takes masks, also ones that no object has, and gives notes as strings."""
    scene = make(CAMERAS)
    inside = torch.zeros(len(CAMERAS), CAMERAS.height, CAMERAS.width, 1)
    inside[:, 8:24, 8:24] = 1
    nowhere = torch.zeros_like(inside)
    nowhere[0, :4], nowhere[1:, -4:] = 1, 1
    for masks in (inside, nowhere):
        notes = scene.start_on(masks)
        assert all(isinstance(note, str) for note in notes), "notes are not strings"
        assert _render(scene).alpha.max() > 0, "nothing is left to fit after start_on()"


def saves_one_file(make: MakeScene) -> None:
    """`save` writes one file, or those of a mesh, in any world, and returns the path of the object."""
    scene = make(CAMERAS)
    for world in (None, World(np.array([1.0, 2.0, 3.0]), 0.5)):
        with tempfile.TemporaryDirectory() as directory:
            path = scene.save(Path(directory, "asset.ply"), world)
            files = list(Path(directory).iterdir())
            assert path in files and (path.stem == "mesh" or len(files) == 1), (
                "save() wrote other files than it returned"
            )
            assert {each.stem for each in files} <= {"asset", "mesh"}, "save() wrote no file of that name"
            assert path.stat().st_size > 0, "save() wrote an empty file"


def tells_where_it_is_opaque(make: MakeScene) -> None:
    """`opacity_grid` has the asked number of cells, values in [0, 1], and finds something."""
    grid = make(CAMERAS).opacity_grid(1.0, 12)
    assert grid.shape == (12, 12, 12), f"the grid has shape {tuple(grid.shape)}"
    assert grid.min() >= 0 and grid.max() <= 1, "an opacity of the grid is not in [0, 1]"
    assert grid.max() > 0, "the grid is empty"


CHECKS = (
    has_all_members,
    renders_images,
    renders_several_as_each_alone,
    adds_a_finite_penalty,
    learns_from_its_renders,
    repeats_a_step_with_its_seed,
    goes_on_from_its_state,
    keeps_to_a_limit,
    starts_on_masks,
    saves_one_file,
    tells_where_it_is_opaque,
)


def step(scene: Scene, number: int) -> None:
    """One step towards a black picture, in the order in which a fit calls a scene."""
    (render,) = scene.render_together([scene], [CAMERAS], [SEED])
    scene.watch(number, render.info)
    (render.rgb.square().mean() + scene.penalty(render.info)).backward()
    scene.parameters.step(scene.rates(0.0))
    scene.refine(number, render.info, SEED)


def equal(first: Scene, second: Scene) -> bool:
    """Whether the parameters of two scenes are the same to the bit."""
    ours, theirs = first.parameters.tensors, second.parameters.tensors
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
def _render(scene: Scene) -> Render:
    (render,) = scene.render_together([scene], [CAMERAS], [None])
    return render


def _brightness(scene: Scene) -> Tensor:
    return _render(scene).rgb.mean()
