"""`im3d batch` with a shrunk config, in real or with a stand-in for the model."""

import json
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from im3d_jax import asset, config_flags, main, pipeline
from im3d_jax.asset import Asset
from recon_torch import outputs
from recon_torch.files import write_json
from recon_torch.views.cameras import orbit

CHANGES = """
    config.video.num_steps = 2
    config.rounds.update(at_steps=(2,), num_steps=1)
    config.fit.update(num_gaussians=100, num_steps=4, lpips_net="alex")
    config.turntable.update(num_frames=2, size=32)
"""


@pytest.fixture(scope="module")
def config_path(tmp_path_factory, write_runnable):
    return write_runnable(tmp_path_factory.mktemp("config"), CHANGES)


@pytest.fixture
def command(config_path, tmp_path, monkeypatch):
    """Runs `im3d batch` on prompts (or what is in prompts.jsonl), into OUT. Returns the exit code."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def run(*flags, prompts=None, out=tmp_path / "out"):
        path = tmp_path / "prompts.jsonl"
        if prompts is not None:
            path.write_text("".join(json.dumps(each) + "\n" for each in prompts))
        flags = [f"--prompts={path}", f"--out={out}", f"--config={config_path}", *map(str, flags)]
        try:
            return main.run(["batch", *flags])
        except SystemExit as exit:
            return exit.code

    return run


@pytest.fixture
def quick(monkeypatch):
    """A loaded model whose assets are nothing but their reports, for tests that do not look at assets.

    Set the `verdicts` on assets, or what `happens` while one is made, by their prompts. `made` lists the
    prompts in the order in which their assets were made.
    """

    class Client:
        def close(self):
            pass

    class Quick:
        def __init__(self):
            self.verdicts, self.happens, self.made, self.config = {}, {}, [], None

        def load(self, config):
            self.config, self.settings = config, pipeline.read_settings(config)
            return self

        def warnings(self, prompt):
            return []

        def start_client(self):
            return Client()

        def make_best(self, request, client, num_retries, show):
            self.happens.get(request.prompt, lambda _: None)(show)
            self.made.append(request.prompt)
            verdict = self.verdicts.get(request.prompt, "good")
            digest = asset.file_digest(request.image)
            report = {
                **asset.origin(request, digest, config_flags.config_digest(self.config)),
                "image": request.image,
                "quality": {"verdict": verdict, "reasons": [], "hints": []},
                "rounds": [{"psnr": 20.0}],
                "seconds": {"total": 1.0},
            }
            if verdict == "bad" and num_retries:
                report["tries"] = [report | {"seed": request.seed}] * (1 + num_retries)
            write = partial(write_json, content=report)
            outputs.put(request.out, asset.ASSET, "report.json", write)
            return Asset(request.out, report, orbit(1), [])

    quick = Quick()
    monkeypatch.setattr(pipeline, "load", quick.load)
    return quick


@pytest.fixture
def pictures(tmp_path):
    """ball.png and a file that is no picture."""
    inside = np.hypot(*(np.mgrid[:40, :40] - 20)) < 10
    Image.fromarray(np.where(inside[..., None], [200, 30, 40], 255).astype(np.uint8)).save(
        tmp_path / "ball.png"
    )
    (tmp_path / "broken.png").write_text("no picture")
    return tmp_path / "ball.png", tmp_path / "broken.png"
