"""The contract of scenes, on all that are shipped; and each check on a scene that breaks it."""

from dataclasses import replace

import pytest
import torch

from recon_torch.scene import conformance, new_scene
from recon_torch.scene.splats import Splats
from recon_torch.settings import Engine, FitSettings, Representation

pytestmark = pytest.mark.slow

SETTINGS = FitSettings(
    num_gaussians=300,
    num_steps=50,
    nerf_cells=8,
    nerf_samples=8,
    mesh_cells=8,
    mesh_colors=8,
    refine_every=1,
    engine=Engine.CPU,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("representation", Representation)
def test_a_shipped_scene_keeps_the_contract(representation, check):
    settings = replace(SETTINGS, representation=representation)
    check(lambda cameras: new_scene(cameras, settings, CPU))


class NoRate(Splats):
    def rates(self, progress):
        return {name: rate for name, rate in super().rates(progress).items() if name != "means"}


class Unseeded(Splats):
    def refine(self, step, info, seed):
        super().refine(step, info, int(torch.randint(1000, ())))
        self.parameters.tensors["means"].data += 0.01 * torch.rand(3)


class Forgetful(Splats):
    def state_dict(self):
        state = super().state_dict()
        return state | {"params": {name: torch.ones_like(t) for name, t in state["params"].items()}}


class Unlimited(Splats):
    def limit(self, max_gaussians):
        pass


class Stuck(Splats):
    def rates(self, progress):
        return dict.fromkeys(super().rates(progress), 1e-12)


class Mislabelled(Splats):
    def save(self, path, *where):
        return super().save(path, *where).with_name("other.ply")


@pytest.mark.parametrize(
    ("check", "scene", "message"),
    [
        (conformance.has_all_members, NoRate, "does not name all parameters"),
        (conformance.repeats_a_step_with_its_seed, Unseeded, "the same seeds"),
        (conformance.goes_on_from_its_state, Forgetful, "a restored scene"),
        (conformance.keeps_to_a_limit, Unlimited, "after limit"),
        (conformance.learns_from_its_renders, Stuck, "do not change"),
        (conformance.saves_one_file, Mislabelled, "wrote other files"),
    ],
)
def test_a_scene_that_breaks_the_contract_is_told_how(check, scene, message):
    with pytest.raises(AssertionError, match=message):
        check(lambda cameras: scene(cameras, SETTINGS, CPU))
