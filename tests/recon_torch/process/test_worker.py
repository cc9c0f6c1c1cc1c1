"""The worker's side of the protocol, run in this process, with fits that run out of memory."""

from types import SimpleNamespace

import pytest
import torch

from recon_torch.fit.optimization import Fit
from recon_torch.process import worker
from recon_torch.process.protocol import Beat, Done, Failed, FitUntil, SetTargets, Start
from recon_torch.process.worker import OUT_OF_MEMORY, Worker
from recon_torch.settings import FitSettings
from recon_torch.views.cameras import orbit

pytestmark = pytest.mark.slow

CAMERAS = orbit(2, size=32)
SETTINGS = FitSettings(
    num_gaussians=400, num_steps=200, start="ball", lpips_net="alex", w_lpips=0.0, w_rgb=1.0
)


class NoRoomForGaussians(Fit):
    """A fit that runs out of memory with more than 300 Gaussians."""

    def run(self, until_step, on_step=None):
        if self.num_gaussians > 300 and until_step > 1:
            raise MemoryError
        super().run(until_step, on_step)


class NoRoomForViews(Fit):
    """A fit that runs out of memory when it gets more than one view; the worker warms up with one."""

    def set_targets(self, views, masks, weights=None):
        if len(views) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().set_targets(views, masks, weights)


def serve(snapshot_path, *commands):
    """The worker's answers to Start and these commands, and all of its replies."""
    replies = []
    start = Start(CAMERAS, SETTINGS, "cpu", str(snapshot_path), 1e9)
    Worker(SimpleNamespace(send=replies.append)).serve(iter([start, *commands]))
    return [reply for reply in replies if isinstance(reply, Done | Failed)], replies


def targets() -> SetTargets:
    masks = torch.zeros(2, 32, 32, 1)
    masks[:, 8:24, 8:24] = 1
    return SetTargets(1 - 0.5 * masks.expand(-1, -1, -1, 3), masks)


def test_out_of_memory_is_noted_and_the_limit_outlives_the_worker(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(worker, "Fit", NoRoomForGaussians)
        answers, replies = serve(tmp_path / "snapshot.pt", targets(), FitUntil(60))
    note = next(note for note in answers[-1].notes if "out of memory" in note)
    assert "with 400 Gaussians" in note and "at most 200" in note
    assert answers[-1].step == 60 and answers[-1].num_gaussians <= 200
    assert sum(isinstance(reply, Beat) for reply in replies) == 2  # one for each snapshot

    answers, _ = serve(tmp_path / "snapshot.pt", targets(), FitUntil(110))  # the next worker
    assert note in answers[-1].notes and answers[-1].step == 110 and answers[-1].num_gaussians <= 200


def test_out_of_memory_for_the_views_is_reported_as_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "Fit", NoRoomForViews)
    answers, _ = serve(tmp_path / "snapshot.pt", targets())
    assert answers[1] == Failed(by_user=True, text=OUT_OF_MEMORY)
