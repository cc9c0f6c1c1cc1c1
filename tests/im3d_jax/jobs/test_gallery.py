"""Summary and pages, read back with Python's HTML parser; what users wrote stays text."""

import json
import shutil
from html.parser import HTMLParser

import pytest

from im3d_jax import main
from im3d_jax.jobs import gallery, publish
from im3d_jax.jobs.index import Index
from recon_torch.errors import UserError

ATTACKS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "../../x", "a & b", "half \ud800"]

WITHOUT_ROUNDS = '{"quality": {"verdict": "good", "reasons": [], "hints": []}, "rounds": []}'


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text by paragraph."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *each) for each in attributes]

    def handle_data(self, data):
        self.texts.append(data)

    def values(self, tag, name):
        return [value for found, key, value in self.attributes if (found, key) == (tag, name)]


def make_asset(out, number, prompt="a duck", verdict="good", psnr=20.0, total=30.0, reasons=()):
    directory = out / "assets" / f"{number:06d}"
    directory.mkdir(parents=True)
    report = {
        "prompt": prompt,
        "image": "",
        "seed": 0,
        "quality": {"verdict": verdict, "reasons": list(reasons), "hints": []},
        "rounds": [{"psnr": 1.0}, {"psnr": psnr}],
        "seconds": {"fit": total / 2, "total": total},
    }
    (directory / "report.json").write_text(json.dumps(report))


def make_failure(out, number, prompt, error):
    directory = out / "assets" / f"{number:06d}"
    directory.mkdir(parents=True)
    content = {"prompt": prompt, "image": "", "seed": 0, "error": error, "details": ""}
    (directory / "error.json").write_text(json.dumps(content))


def write(out):
    return publish.write(Index(out).refresh())


def test_what_users_wrote_is_text(tmp_path):
    for number, prompt in enumerate(ATTACKS):
        make_asset(tmp_path, number, prompt, reasons=[prompt], verdict="suspect")
        make_failure(tmp_path, 100 + number, prompt, prompt)
    make_asset(tmp_path, 200, verdict='"><script>')  # none of ours
    (tmp_path / "assets" / "<script>").mkdir()
    write(tmp_path)
    page = Page(tmp_path / "gallery.html")
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    for prompt in (each.replace("\ud800", "?") for each in ATTACKS):
        assert page.texts.count(prompt) == 4, prompt
    targets = page.values("a", "href") + page.values("img", "src")
    assert len(targets) == 5 * 5 + 5
    assert all(target.startswith("assets/0000") or target.startswith("assets/0001") for target in targets)
    assert not any(".." in target for target in targets)


def test_a_verdict_is_filtered_without_scripts(tmp_path):
    for number, verdict in enumerate(("good", "bad", "good", "suspect")):
        make_asset(tmp_path, number, verdict=verdict)
    make_failure(tmp_path, 4, "a duck", "why")
    write(tmp_path)
    page = Page(tmp_path / "gallery.html")
    assert page.values("article", "class") == ["good", "bad", "good", "suspect", "failed"]
    assert page.values("label", "for") == page.values("input", "id")
    assert [t for t in page.texts if "(" in t and ":" not in t] == [
        "all (5)", "good (2)", "suspect (1)", "bad (1)", "failed (1)",
    ]  # fmt: skip
    style = "".join(page.texts)
    for kind in gallery.KINDS:  # the inputs come before <main>, beside it, as ~ wants it
        assert f"#show-{kind}:checked ~ main article:not(.{kind}) {{ display: none }}" in style
    assert page.tags.index("input") < page.tags.index("main")


def test_pages_hold_200_and_stale_ones_go(tmp_path):
    for number in range(401):
        make_asset(tmp_path, number)
    (tmp_path / "gallery_holiday.html").write_text("mine")
    write(tmp_path)
    pages = ["gallery.html", "gallery_2.html", "gallery_3.html", "gallery_holiday.html"]
    assert sorted(path.name for path in tmp_path.glob("gallery*.html")) == pages
    ids = [Page(tmp_path / name).values("article", "id") for name in pages[:3]]
    assert [len(each) for each in ids] == [200, 200, 1]
    assert sum(ids, []) == [f"{number:06d}" for number in range(401)]
    links = Page(tmp_path / pages[1]).values("a", "href")
    assert {"gallery.html", "gallery_3.html"} == {link for link in links if link.startswith("gallery")}
    shutil.rmtree(tmp_path / "assets/000400")
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("gallery*.html")) == [*pages[:2], pages[3]]


@pytest.mark.parametrize("name", ["summary.json", "gallery.html", "index.parquet"])
def test_a_file_of_a_users_is_not_replaced(tmp_path, name):
    make_asset(tmp_path, 0)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not of an earlier run"):
        write(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_the_summary_counts_and_averages(tmp_path, capsys):
    make_asset(tmp_path, 0, psnr=20.0, total=30.0)
    make_asset(tmp_path, 1, psnr=30.0, total=50.0, verdict="bad")
    make_failure(tmp_path, 2, "a duck", "why")
    (tmp_path / "assets" / "000003").mkdir()  # another shard is at it
    assert main.run(["batch", "--summarize", str(tmp_path)]) == 0
    assert "gallery.html" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "num_asked": None,  # nobody has said it
        "num_shards": None,
        "num_assets": 2,
        "verdicts": {"good": 1, "suspect": 0, "bad": 1},
        "num_failed": 1,
        "num_missing": None,
        "mean_psnr": 25.0,
        "mean_seconds": {"fit": 20.0, "total": 40.0},
        "assets_per_hour": 90.0,
        "failures": {"000002": "why"},
        "missing": [],
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"quality": 3}', WITHOUT_ROUNDS])
def test_reports_that_are_none_are_passed_over(content, tmp_path):
    (tmp_path / "assets" / "000000").mkdir(parents=True)
    (tmp_path / "assets" / "000000" / "report.json").write_text(content)
    write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_assets"], summary["mean_psnr"]) == (0, None)


def test_a_directory_without_a_batch_is_refused(tmp_path, capsys):
    assert main.run(["batch", "--summarize", str(tmp_path)]) == 2
    assert "no batch in" in capsys.readouterr().err


def test_an_error_that_is_no_text_is_shown_as_one(tmp_path):
    """Infinity is no JSON, but Python's json writes it and reads it."""
    make_failure(tmp_path, 0, "a duck", {"loss": float("inf")})
    make_failure(tmp_path, 1, float("nan"), float("inf"))
    write(tmp_path)
    failures = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)["failures"]
    assert "Infinity" in failures["000000"] and failures["000001"] == "Infinity"


def test_assets_with_a_page_have_a_link_to_it(tmp_path):
    for number in range(2):
        make_asset(tmp_path, number)
    (tmp_path / "assets" / "000001" / "asset.html").write_text("a page")
    write(tmp_path)
    links = Page(tmp_path / "gallery.html").values("a", "href")
    assert [each for each in links if each.endswith("asset.html")] == ["assets/000001/asset.html"]
