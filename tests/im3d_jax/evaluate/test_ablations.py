"""The rows of ablations, what is kept of them, and what is said of their numbers."""

import contextlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from im3d_jax import config_flags, pipeline
from im3d_jax.autoencoders.patches import Patches
from im3d_jax.clips import Clip
from im3d_jax.commands import evaluate
from im3d_jax.conditions.conditioning import Conditioning
from im3d_jax.evaluate import published, result_file
from im3d_jax.evaluate.ablations import fewer_views, measuring, reporting, rows, tables
from im3d_jax.evaluate.ablations.tables import Row, Table
from im3d_jax.evaluate.truth import ProceduralObjects, Truth
from im3d_jax.generator import CallCount, Generator
from im3d_jax.pipeline import Pipeline
from recon_torch.errors import UserError
from recon_torch.losses.lpips import PerceptualDistance
from recon_torch.views.cameras import orbit

SIZE, NUM_VIEWS = 32, 4


@pytest.fixture(scope="module")
def config():
    return config_flags.load("configs/tiny.py")


@pytest.fixture(scope="module")
def ready(config):
    return rows.ready(config, tables.TABLES)


def flat(config):
    found = {}

    def walk(values, prefix):
        for name, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    walk(config.to_dict(), "")
    return found


# ---- Rows ----


def test_a_row_differs_from_the_config_in_the_entries_that_it_names_and_in_no_other(config, ready):
    before = flat(config)
    for name, some in ready.items():
        for row, each in zip(tables.TABLES[name].rows, some, strict=True):
            assert flat(each.config) == before | dict(row.overrides)
            named = {key for key, value in row.overrides.items() if before[key] != value}
            assert set(rows.changes(config, each)) - {"frames"} == named


def test_rows_of_one_sampling_share_videos_and_rows_of_one_config_are_one(ready):
    assert len({each.video_digest for each in [*ready["2"], *ready["fig4"], *ready["fig6"]]}) == 1
    assert len({each.video_digest for each in ready["3"]}) == 3  # of 16, 8 and 4 frames
    every = [each for some in ready.values() for each in some]
    assert len({each.model_digest for each in every}) == 1
    same = [
        ("fig6", 0, "2", 0),
        ("fig6", 1, "2", 2),
        ("fig4", 2, "4", 0),
        ("fig4", 0, "4", 5),
        ("3", 0, "4", 0),
        ("2", 7, "4", 0),
    ]
    for one, i, other, j in same:
        assert ready[one][i].digest == ready[other][j].digest
    assert len({each.digest for each in every}) == len(every) - len(same)


def test_the_calls_that_rows_are_named_after_are_those_of_their_configs(ready):
    for each in ready["4"]:
        made = each.config.rounds
        calls = each.config.video.num_steps + len(made.at_steps) * made.num_runs * made.num_steps
        assert each.row.name.startswith(f"{calls} calls")


def test_rows_that_the_paper_has_are_called_as_it_calls_them():
    for name in ("2", "3"):
        table = tables.TABLES[name]
        stated = {each.method for each in published.of(table.name)}
        assert stated <= {row.name for row in table.rows}


def test_own_rows(config):
    row = rows.parse('late rounds: --config.rounds.at_steps="(600, 1100)" fit.w_ssim=0 frames=8')
    assert row == Row("late rounds", {"rounds.at_steps": "(600, 1100)", "fit.w_ssim": "0"}, 8)
    [_, ready] = rows.ready(config, {tables.OWN: Table("Own rows", "", (Row("as configured"), row))})[
        tables.OWN
    ]
    assert rows.changes(config, ready) == {"rounds.at_steps": [600, 1100], "fit.w_ssim": 0.0, "frames": 8}


MISTAKES = {
    "": "nothing to measure; give --table, one of 2, 3, 4, fig4, fig6, or --row",
    "--table 5": "--table '5'; there are 2, 3, 4, fig4, fig6",
    "--table 3 --num-objects 0": "'0' is not a whole number from 1",
    "--table 4 --config.fit.num_steps=900": "Table 4, row '80 calls.*make each larger than the one before",
    "--table 3 --config.video.start=1": "unknown config key 'video.start'",
    "--row x": "'NAME: KEY=VALUE'",
    "--row a:fit.w_ssim": "'NAME: KEY=VALUE'",
    "--row a:frames=x": "frames is 'x'; give a whole number",
    "--row a:frames=17": "row 'a': frames is 17, of 16 views",
    "--row a:fit.w_ssim=0 --row a:fit.w_ssim=1": "two rows are called 'a'",
    "--row a:fit.w_ssim=-1": "row 'a': config.fit.w_ssim is -1.0; give a number from 0",
    "--row a:fit.ssim=0": "row 'a': unknown config key 'fit.ssim'",
    "--row a:size=32": "row 'a': it changes config.size",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_written(flags, tmp_path, user_error, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("loaded before all rows were checked"))
    with user_error(MISTAKES[flags]):
        evaluate.main(["ablations", f"--out={tmp_path / 'out'}", *flags.split()])
    assert not (tmp_path / "out").exists()


def test_rows_without_lpips_in_their_loss_are_refused(config, ready, user_error):
    with user_error("Table 2, row 'IM-3D': LPIPS has no trained weights here, so the loss would go without"):
        rows.check_lpips(ready, has_random_weights=True)
    rows.check_lpips(ready, has_random_weights=False)
    rows.check_lpips({name: ready[name] for name in ("3", "4", "fig4")}, has_random_weights=True)
    random = config_flags.with_overrides(config, {"fit.lpips_weights": "random"})
    rows.check_lpips(rows.ready(random, {"fig6": tables.TABLES["fig6"]}), has_random_weights=True)


def test_a_backbone_with_a_number_of_views_of_its_own_is_refused_others(config, monkeypatch, user_error):
    class Fixed:
        num_views = 21

    monkeypatch.setattr("im3d_jax.backbones.build", lambda *_: Fixed())
    with user_error("Table 3, row '16 frames': config.num_views is 16, but emu_video makes 21"):
        rows.ready(config, {"3": tables.TABLES["3"]})


# ---- Fewer views ----


class Worker:
    """A `ReconstructionClient` whose renders are of the mean colour of its targets."""

    step, num_gaussians, notes = 0, 7, []
    started = 0

    def __init__(self):
        self.reset(orbit(NUM_VIEWS, 0.3, SIZE))
        self.renders, self.alphas = self.views, self.masks

    def inspect(self, *_):
        raise AssertionError("ablations need neither verdicts nor files")

    export = inspect

    def reset(self, cameras=None, settings=None):
        self.cameras, self.settings = cameras, settings
        shape = (len(cameras), SIZE, SIZE)
        self.views, self.masks = torch.zeros(*shape, 3), torch.zeros(*shape, 1)

    def set_targets(self, weights=None):
        self.weights, self.seen = weights, self.views.mean((1, 2, 3)).tolist()

    def fit(self, until_step, on_progress=None):
        Worker.started += 1
        return {"psnr": 30.0}

    def render(self, cameras=None):
        count = len(cameras or self.cameras)
        self.renders = torch.full((count, SIZE, SIZE, 3), float(np.mean(self.seen))).clone()
        self.alphas = torch.ones(count, SIZE, SIZE, 1)
        return self.renders, self.alphas

    def close(self):
        pass


@pytest.mark.parametrize(("count", "num_views", "chosen"), [(8, 16, range(0, 16, 2)), (4, 16, [0, 4, 8, 12]),
                                                            (3, 4, [0, 1, 2]), (1, 16, [0])])  # fmt: skip
def test_views_are_chosen_evenly(count, num_views, chosen):
    assert fewer_views.evenly(count, num_views).tolist() == list(chosen)


def test_a_fit_of_fewer_views_sees_those_and_renders_all():
    worker = Worker()
    client = fewer_views.FewerViews(worker, 2)
    cameras = orbit(NUM_VIEWS, 0.3, SIZE)
    client.reset(cameras)
    np.testing.assert_array_equal(worker.cameras.w2c, cameras.w2c[[0, 2]])
    client.views[:] = torch.arange(NUM_VIEWS)[:, None, None, None]
    client.set_targets([1.0, 2.0, 3.0, 4.0])
    assert worker.seen == [0, 2] and worker.weights == [1, 3]
    renders, alphas = client.render()
    assert len(renders) == len(alphas) == NUM_VIEWS and client.renders is renders
    assert len(client.render(cameras[[0]])[0]) == 1


# ---- Measuring ----


class NoLpips(PerceptualDistance):
    """A score that is 0 everywhere, of a network that is never loaded."""

    random_weights = True

    def __init__(self, *_):
        pass

    def features(self, images, num_stages=None):
        return []

    def distance(self, images, target_features):
        return torch.zeros(len(images))


class Grey(Generator):
    """A generator of grey videos, whose steps are counted. It loads nothing."""

    def __init__(self, settings):
        values = dict(video=settings.video, rounds=settings.rounds, clip=Clip(settings.num_views), size=SIZE)
        values |= dict(count=CallCount(), turn=contextlib.nullcontext(), params={}, codec=Patches(patch=4))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    sampled = 0

    def counting(self):
        return Grey(self)

    def condition(self, captions, rgb, alpha, elevation_rad):
        return Conditioning(self.codec.encode(rgb, alpha), jnp.ones(1), (), ())

    def decode_clip(self, latents):
        return self.codec.decode(latents)

    def turntable(self, given, key, on_step):
        Grey.sampled += 1
        self.count.calls += self.video.num_steps
        return jnp.zeros((1, self.num_views, *given.image.shape[1:]))

    def refine(self, renders, given, key, on_step):
        self.count.calls += self.rounds.num_steps
        return renders


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command on two objects with a generator and a worker that cost nothing."""
    path = tmp_path / "config.py"
    path.write_text(
        "import sys\nfrom configs import tiny\n\ndef get_config():\n    config = tiny.get_config()\n"
        f"    config.update(size={SIZE}, num_views={NUM_VIEWS})\n    return config\n"
    )

    class Loaded(Pipeline):
        def __init__(self, config):
            settings = pipeline.read_settings(config)
            self.generator, self.estimator, self.settings = Grey(config), torch.nn.Identity(), settings

        def start_client(self):
            return Worker()

    def render(self, count, split="test", azimuths_rad=None):
        rgb = np.full((count, NUM_VIEWS, SIZE, SIZE, 3), 0.5, np.float32)
        rgb += np.arange(count, dtype=np.float32)[:, None, None, None, None] / 8
        names = [f"object {b}" for b in range(count)]
        return Truth(list(range(count)), names, names, np.full(count, 0.3), rgb, np.ones_like(rgb[..., :1]))

    monkeypatch.setattr("recon_torch.losses.lpips.PerceptualDistance", NoLpips)
    monkeypatch.setattr(pipeline, "load", Loaded)
    monkeypatch.setattr(measuring, "_like", lambda first, each: Loaded(each.config))
    monkeypatch.setattr(measuring, "estimate", lambda *_: 0.3)
    monkeypatch.setattr(ProceduralObjects, "render", render)

    def command_on(*flags, out="out"):
        Worker.started = Grey.sampled = 0
        fixed = [f"--config={path}", f"--out={tmp_path / out}", "--num-objects=2", "--resamples=200"]
        evaluate.main(["ablations", *flags, *fixed])
        return result_file.read(tmp_path / out)

    return command_on


def test_tables_plots_and_sheets_are_written_and_a_second_run_makes_nothing_again(run, tmp_path, capsys):
    found = run("--table=fig4", "--row=half: frames=2 fit.w_ssim=0")
    out = tmp_path / "out"
    # Fits of 0, 1, 2, 3 rounds, of the config, which has 2 rounds and is the same row, and of the own row.
    assert Worker.started == 2 * (1 + 2 + 3 + 4 + 3) and Grey.sampled == 2
    assert {path.name for path in out.glob("[ps]*/*")} == {"fig_4.png", "own_rows.png"}
    calls = {row.method: row.scores["network_calls"] for row in result_file.rows_of(found)}
    assert calls["Fig. 4: no rounds"] == 40 and calls["Fig. 4: 3 rounds"] == 40 + 3 * 2 * 10
    assert found["methods"][-1]["changes"] == {"fit.w_ssim": 0.0, "frames": 2}
    assert [each["axis"] for each in found["methods"][:4]] == [0, 1, 2, 3]
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and "## Fig. 4: rounds of refinement" in table

    again = run("--table=fig4", "--row=half: frames=2 fit.w_ssim=0")
    assert Worker.started == Grey.sampled == 0 and again["rows"] == found["rows"]
    [kept] = [path for path in out.glob("cells/*/0001.json") if 'network_calls": 40' in path.read_text()]
    kept.unlink()
    run("--table=fig4")  # that row of that object alone, with the video that is there
    assert Worker.started == 1 and Grey.sampled == 0


def test_an_asset_that_fails_is_named_and_tried_again(run, tmp_path, monkeypatch):
    def fit(self, until_step, on_progress=None):
        if self.settings.w_ssim == 0:
            raise UserError("nothing is left")
        return {"psnr": 30.0}

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "fit", fit)
        found = run("--row=a: fit.w_ssim=0", "--row=b: fit.w_mask=0")
        assert "2 of 6 assets failed: nothing is left" in found["about"]
        assert {each["method"] for each in found["trends"]} == {"Own rows: b"}
        assert "| a | 0 | - |" in (tmp_path / "out/table.md").read_text()
    assert len(run("--row=a: fit.w_ssim=0")["trends"]) == 1


def test_nothing_measured_is_an_error(run, monkeypatch, user_error):
    def fit(self, until_step, on_progress=None):
        raise UserError("nothing is left")

    monkeypatch.setattr(Worker, "fit", fit)
    with user_error("nothing could be measured: 4 of 4 assets failed: nothing is left"):
        run("--row=a: fit.w_ssim=0")


def test_statistics_are_those_of_numpy(run):
    found = run("--row=a: fit.w_ssim=0")
    scores = {
        name: np.array([row.scores["psnr"] for row in each])
        for name, each in result_file.by_method(result_file.rows_of(found)).items()
    }
    first, other = scores["Own rows: as configured"], scores["Own rows: a"]
    [difference] = [each for each in found["differences"] if each["score"] == "psnr"]
    assert difference["first"] == "Own rows: a"
    assert difference["mean"] == pytest.approx(np.mean(other - first))
    summary = next(each for each in found["summary"] if each["score"] == "psnr")
    assert summary["mean"] == pytest.approx(np.mean(first))
    assert summary["interval"] == pytest.approx([first.min(), first.max()])  # of two objects
    expected = [10 * np.log10(1 / (0.5 - grey) ** 2) if grey != 0.5 else 99 for grey in (0.5, 0.625)]
    np.testing.assert_allclose(first, expected, rtol=1e-4)


class Colors:
    """A CLIP by hand: red, green and blue are its axes, of pictures and of words."""

    max_tokens = 4

    def embed_pictures(self, pictures):
        return np.array([picture.mean((0, 1)) / np.linalg.norm(picture.mean((0, 1))) for picture in pictures])

    def embed_captions(self, captions):
        return np.array([{"red": (1.0, 0, 0), "green": (0, 1.0, 0)}[each] for each in captions]), np.zeros(
            1, bool
        )


def test_scores_by_clip_are_means_over_renders(tmp_path):
    axes = np.eye(3, dtype=np.float32)[:, None, None] * np.ones((1, 4, 4, 1), np.float32)
    red, green, _ = axes
    objects = ProceduralObjects(0, 4, 4)
    bench = measuring.Bench(objects, 1, 4, 4, 0, NoLpips(), {}, Colors(), tmp_path)
    judge = measuring.Judge((axes, axes[..., :1]), NoLpips())
    seen = measuring.Seen(0, "green", (red[None], red[None, ..., :1]), 0.3, axes, judge)
    found = bench._by_clip(np.stack([red, red, red, green]), seen)  # noqa: SLF001
    assert found == {"clip_image": pytest.approx(75), "clip_text": pytest.approx(25)}


TRENDS = [
    (-1, (-2.0, -1.0), 6, "shows"),
    (-1, (1.0, 2.0), 6, "the reverse"),
    (-1, (-1.0, 1.0), 6, "not seen"),
    (1, (1.0, 2.0), 6, "shows"),
    (0, (1.0, 2.0), 6, "better"),
    (0, (-1.0, 2.0), 6, "no difference seen"),
    (-1, (-2.0, -1.0), 5, "too few objects"),
]


@pytest.mark.parametrize(("expected", "interval", "num_rows", "said"), TRENDS)
def test_trends(expected, interval, num_rows, said):
    assert reporting.trend(expected, interval, num_rows) == said
    assert not expected or said in reporting.SEEN


def test_a_sentence_says_where_the_trend_shows():
    seen = [("a", -1, "shows"), ("b", -1, "not seen"), ("c", 0, "better"), ("d", 1, "shows")]
    trends = [{"method": f"Table 2: {name}", "expected": e, "seen": s} for name, e, s in seen]
    assert reporting.verdict(trends) == (
        "**The paper's trend shows: a, d; it is not seen at this number of objects: b.**\n"
    )
    assert reporting.verdict(trends[1:3]) == "**It is not seen at this number of objects: b.**\n"
    assert reporting.verdict(trends[2:3]) == ""
