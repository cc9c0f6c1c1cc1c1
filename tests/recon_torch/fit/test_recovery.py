"""What goes wrong in the middle of a fit takes it back, and it ends as a careful one from there on."""

import dataclasses

import pytest
import torch

from recon_torch.errors import UserError
from recon_torch.fit import optimization, recovery
from recon_torch.fit.optimization import Fit
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

pytestmark = pytest.mark.slow

CAMERAS = orbit(3, size=32)
SETTINGS = FitSettings(
    num_gaussians=400,
    num_steps=40,
    refine_every=10,
    start="ball",
    lpips_net="alex",
    w_lpips=0.0,
    w_rgb=1.0,
    seed=3,
)


@pytest.fixture(autouse=True)
def frequent_snapshots(monkeypatch):
    """As often as the fits of these tests refine, as it is in earnest."""
    monkeypatch.setattr(recovery, "SNAPSHOT_STEPS", 10)


def new_fit(settings=SETTINGS) -> Fit:
    """A fit of a grey disc on white."""
    fit = Fit(CAMERAS, settings, "cpu")
    ticks = torch.arange(32) - 15.5
    masks = (ticks[:, None] ** 2 + ticks**2 < 80).float()[None, :, :, None].repeat(3, 1, 1, 1)
    fit.set_targets(1 - 0.6 * masks.expand(-1, -1, -1, 3), masks)
    return fit


def at(step, action):
    """A function for `on_step` that calls `action` once, after the given step."""
    acted = []

    def on_step(now, losses):
        if now == step and not acted:
            acted.append(step)
            action()

    return on_step


def poison(fit: Fit) -> None:
    fit.scene.parameters.tensors["means"].data[7] = float("nan")


def run_out_of_memory() -> None:
    raise MemoryError


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a["params"][name], b["params"][name]) for name in a["params"])


def test_a_fit_without_setbacks_is_the_same_as_an_unguarded_one():
    guarded, plain, snapshots = new_fit(), new_fit(), []
    recovery.run(guarded, 14, on_snapshot=lambda state: snapshots.append(state["step"]))
    plain.run(14)
    assert equal(guarded.state_dict(), plain.state_dict())
    assert snapshots == [10, 14] and guarded.setbacks == []


def test_after_nan_a_fit_goes_on_from_the_snapshot_at_half_the_rates_with_another_seed():
    fit, snapshots = new_fit(), {}
    recovery.run(
        fit, 24, at(14, lambda: poison(fit)), lambda state: snapshots.setdefault(state["step"], state)
    )
    assert fit.step == 24 and len(fit.setbacks) == 1
    assert "step 20: the parameters are not finite" in fit.setbacks[0] and "half" in fit.setbacks[0]
    assert all(bool(tensor.isfinite().all()) for tensor in fit.scene.gaussians)

    expected = new_fit(dataclasses.replace(SETTINGS))
    expected.load_state_dict(snapshots[10])
    expected.slow_down(1)
    expected.run(24)
    optimizers = expected.scene.parameters.optimizers
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
    assert rates["sh0"] == SETTINGS.lr_sh0 / 2 and rates["quats"] == SETTINGS.lr_quats / 2
    assert equal(fit.state_dict(), expected.state_dict())
    careless = new_fit()
    careless.run(24)
    assert not equal(fit.state_dict(), careless.state_dict())


def test_a_restored_fit_keeps_its_lower_rates():
    fit = new_fit()
    recovery.run(fit, 12, at(4, lambda: poison(fit)))
    restored = new_fit()
    restored.load_state_dict(fit.state_dict())
    assert restored.setbacks == fit.setbacks and restored.caution == 1
    fit.run(22)
    restored.run(22)
    assert equal(fit.state_dict(), restored.state_dict())


def test_nan_that_always_comes_back_ends_the_fit():
    fit = new_fit()
    seen = []
    with pytest.raises(UserError, match=r"step 10: .*not finite, after 3 fresh attempts"):
        recovery.run(fit, 20, lambda step, losses: (poison(fit), seen.append(step)))
    assert len(seen) == 4 * 10 and len(fit.setbacks) == 3


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_goes_on_with_half_the_gaussians(error):
    fit, counts = new_fit(), []

    def fail():
        counts.append(fit.num_gaussians)
        raise error

    snapshots = {}
    recovery.run(fit, 24, at(14, fail), lambda state: snapshots.setdefault(state["step"], state))
    limit = counts[0] // 2
    assert fit.step == 24 and 0 < fit.num_gaussians <= limit and fit.caution == 0
    assert (
        f"out of memory with {counts[0]} Gaussians" in fit.setbacks[0]
        and f"{limit} Gaussians" in fit.setbacks[0]
    )
    restored = new_fit()
    restored.load_state_dict(snapshots[10])
    restored.limit(limit)
    kept = restored.scene.gaussians.opacity_logits.sort().values
    all_of_them = snapshots[10]["params"]["opacities"].sort().values
    assert torch.equal(kept, all_of_them[-limit:])  # the faintest went
    for optimizer in restored.scene.parameters.optimizers.values():
        (state,) = optimizer.state.values()
        assert len(state["exp_avg"]) == limit


def test_out_of_memory_with_few_gaussians_is_a_users_error():
    fit = new_fit(dataclasses.replace(SETTINGS, num_gaussians=150))
    with pytest.raises(UserError, match=r"only 150 Gaussians; give fewer or smaller views"):
        recovery.run(fit, 10, at(1, run_out_of_memory))


def test_pytorchs_own_message_for_a_full_cpu_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert recovery.is_out_of_memory(raised.value)
    assert not recovery.is_out_of_memory(RuntimeError("shapes differ"))


def test_with_no_gaussians_left_a_fit_goes_back_to_before_they_faded():
    fit = new_fit()
    recovery.run(fit, 24, at(15, lambda: fit.scene.parameters.tensors["opacities"].data.fill_(-20.0)))
    assert fit.step == 24 and fit.num_gaussians > 0
    # The snapshot of step 20 is a good one but for what the next step takes away.
    assert [note.partition(";")[0] for note in fit.setbacks] == [
        "step 20: the fit has pruned every Gaussian"
    ] * 2


def test_bugs_keep_their_traceback():
    def fail():
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        recovery.run(new_fit(), 10, at(3, fail))


def together(num=3):
    """Some fits that differ in their seeds."""
    return [new_fit(dataclasses.replace(SETTINGS, seed=seed)) for seed in range(num)]


def test_fits_without_setbacks_end_as_they_do_alone():
    fits, alone, seen = together(), together(), []
    given_up = recovery.run_together(fits, 14, lambda fit, losses: seen.append((fit.settings.seed, fit.step)))
    assert given_up == [None] * 3
    assert sorted(seen) == [(seed, step) for seed in range(3) for step in range(1, 15)]
    for fit, expected in zip(fits, alone, strict=True):
        expected.run(14)
        assert equal(fit.state_dict(), expected.state_dict()) and fit.setbacks == []


def test_a_setback_of_one_fit_does_not_change_the_others():
    """The second fit has one setback, the third always fails, and the first ends as it does alone."""
    fits, (alone, *_) = together(), together(1)
    alone.run(24)
    once = at(14, lambda: poison(fits[1]))

    def on_step(fit, losses):
        if fit is fits[1]:
            once(fit.step, losses)
        if fit is fits[2] and fit.step > 12:
            poison(fit)

    first, second, third = recovery.run_together(fits, 24, on_step)
    assert first is None and second is None and "after 3 fresh attempts" in str(third)
    assert equal(fits[0].state_dict(), alone.state_dict()) and fits[0].setbacks == []
    assert fits[1].step == 24 and fits[1].scene.parameters.is_finite()


def test_fits_that_do_not_fit_into_memory_run_in_parts(monkeypatch, caplog):
    fits, alone, groups = together(), together(), []
    run_together = optimization.run_together

    def limited(group, stop, on_step=None):
        groups.append(len(group))
        if len(group) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run_together(group, stop, on_step)

    monkeypatch.setattr(optimization, "run_together", limited)
    assert recovery.run_together(fits, 20) == [None] * 3
    assert groups == [3] + 3 * [1] + 3 * [1] and "1 fits run together" in caplog.text
    for fit, expected in zip(fits, alone, strict=True):
        expected.run(20)
        assert equal(fit.state_dict(), expected.state_dict()) and fit.setbacks == []


def test_bugs_keep_their_traceback_also_together():
    with pytest.raises(ZeroDivisionError):
        recovery.run_together(together(2), 10, lambda fit, losses: 1 / 0)
