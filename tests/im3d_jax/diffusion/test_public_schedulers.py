"""Scheduler directories that diffusers writes: our levels are theirs, and what is not honoured is named."""

import json

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from im3d_jax.diffusion import public_schedulers, sampler, schedules
from recon_torch.errors import UserError

FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
PEERS = [
    (FlowMatchEulerDiscreteScheduler(shift=7.0), "1", "flow_euler"),
    (UniPCMultistepScheduler(flow_shift=3.0, **FLOW), "unipc", "flow_unipc"),
    (DPMSolverMultistepScheduler(flow_shift=5.0, **FLOW), "2m", "flow_dpm"),
    (DPMSolverMultistepScheduler(flow_shift=5.0, solver_order=1, **FLOW), "1", "flow_dpm"),
    (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW), "sde_2m", "flow_dpm"),
]


@pytest.mark.parametrize("peer, solver, spacing", PEERS)
def test_a_directory_gives_the_levels_of_its_scheduler(peer, solver, spacing, tmp_path):
    peer.save_pretrained(tmp_path)
    found = public_schedulers.read(str(tmp_path))
    assert (found.solver, found.spacing) == (solver, spacing)
    peer.set_timesteps(10)
    schedule = schedules.make_schedule("diffusers", path=str(tmp_path), shift=None)
    steps = sampler.make_steps(schedule, 10, found.spacing)
    np.testing.assert_allclose(steps.sigmas, peer.sigmas, atol=1e-6)
    np.testing.assert_allclose(steps.timesteps, peer.timesteps, rtol=1e-6)


@pytest.mark.parametrize("rule", schedules.TokenRule)
def test_a_dynamic_shift_is_that_of_its_number_of_tokens(rule, tmp_path):
    line = dict(base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096)
    peer = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=rule.value, **line)
    peer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="depends on the number of tokens; set config.schedule.num_tokens"):
        schedules.make_schedule("diffusers", path=str(tmp_path))
    schedule = schedules.make_schedule("diffusers", path=str(tmp_path), num_tokens=2000)
    mu = 0.95 + (2000 - 1024) * (2.05 - 0.95) / (4096 - 1024)
    peer.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=mu)
    np.testing.assert_allclose(sampler.make_steps(schedule, 6).sigmas, peer.sigmas, atol=1e-6)


EULER, UNIPC, DPM = (peer for peer, *_ in PEERS[:3])
REFUSED = [
    (EULER, dict(shift_terminal=0.1), "has shift_terminal 0.1, and here is only None"),
    (EULER, dict(invert_sigmas=True), "has invert_sigmas True"),
    (EULER, dict(stochastic_sampling=True), "has stochastic_sampling True"),
    (EULER, dict(use_beta_sigmas=True), "has use_beta_sigmas True, and here is only False"),
    (EULER, dict(flow_shift=3.0), "has flow_shift 3.0, which is not known here"),
    (EULER, dict(num_train_timesteps=500), "num_steps is 1000, and .* has num_train_timesteps 500"),
    (EULER, dict(shift="3"), "config.schedule.shift is '3'; give a number"),
    (UNIPC, dict(solver_order=3), "has solver_order 3, and here is only 2"),
    (UNIPC, dict(solver_type="bh1"), "has solver_type 'bh1', and here is only 'bh2'"),
    (UNIPC, dict(use_flow_sigmas=False), "has use_flow_sigmas False"),
    (UNIPC, dict(prediction_type="epsilon"), "has prediction_type 'epsilon', and here is only 'flow_pred"),
    (UNIPC, dict(disable_corrector=[0]), "has disable_corrector"),
    (UNIPC, dict(my_option=1), "has my_option 1, which is not known here"),
    (
        DPM,
        dict(algorithm_type="dpmsolver"),
        "has algorithm_type 'dpmsolver', and here is only 'dpmsolver\\+\\+' or",
    ),
    (DPM, dict(final_sigmas_type="sigma_min"), "has final_sigmas_type"),
    (DDIMScheduler(), {}, "is of 'DDIMScheduler'; there is FlowMatchEulerDiscreteScheduler, "),
]


@pytest.mark.parametrize("peer, changes, message", REFUSED)
def test_what_is_not_honoured_is_named(peer, changes, message, tmp_path, user_error):
    peer.save_pretrained(tmp_path)
    file = tmp_path / public_schedulers.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with user_error(message):
        schedules.make_schedule("diffusers", path=str(tmp_path))


def test_files_that_are_not_there_or_say_too_little(tmp_path, user_error):
    with user_error("no scheduler_config.json in .*; give the scheduler's directory"):
        schedules.make_schedule("diffusers", path=str(tmp_path))
    with user_error("diffusers needs the argument path"):
        schedules.make_schedule("diffusers")
    file = tmp_path / public_schedulers.FILE
    file.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}))
    with user_error("lacks prediction_type, so this is not one of flow matching"):
        schedules.make_schedule("diffusers", path=str(tmp_path))
    EULER.save_pretrained(tmp_path)
    with user_error("does not depend on it; remove it"):
        schedules.make_schedule("diffusers", path=str(tmp_path), num_tokens=10)
