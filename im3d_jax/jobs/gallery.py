"""What all shards of a batch have made, to look at: gallery.html.

The pages are static and can be opened from a disk: their links are relative, they have no scripts, and all
that users wrote is escaped. Radio buttons and CSS filter them by verdict.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

from im3d_jax.asset import REPORT
from im3d_jax.jobs import ASSETS, BATCH, ERROR, summary
from im3d_jax.jobs.outcomes import FAILED
from im3d_jax.jobs.summary import KINDS, SUMMARY, Entry
from recon_torch import outputs
from recon_torch.files import replacing
from recon_torch.page import PAGE

ASSETS_PER_PAGE = 200


def write(out: Path) -> str:
    """Writes summary.json and gallery.html, gallery_2.html, ... of a batch, and says where they are.

    Raises UserError if `out` is not the directory of a batch, and for files of these names that are not ours.
    """
    assets, totals = summary.write(out)
    pages = [assets[i : i + ASSETS_PER_PAGE] for i in range(0, max(len(assets), 1), ASSETS_PER_PAGE)]
    names = [page_name(number) for number in range(len(pages))]
    for name, page in zip(names, pages, strict=True):
        with replacing(out / name) as temporary:
            temporary.write_text(render(page, name, names, assets), encoding="utf-8", errors="replace")
    for stale in outputs.files_of(out, BATCH):
        if stale.name not in (SUMMARY, *names):
            stale.unlink(missing_ok=True)
    missing = f"{totals['num_missing']} of the batch's {totals['num_asked']} assets are missing"
    return f"{missing + '; ' if totals['num_missing'] else ''}see {out / names[0]} and {SUMMARY}"


def page_name(number: int) -> str:
    return f"gallery_{number + 1}.html" if number else "gallery.html"


# ---- The pages ----

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; background: #f4f4f2; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px }
article { background: #fff; border-top: 4px solid; padding: 8px; overflow-wrap: anywhere }
article img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff }
article p { margin: 4px 0 } small { color: #666 } label { margin-right: 1em; cursor: pointer }
.good { border-color: #3a8f4d } .suspect { border-color: #d99a1c }
.bad { border-color: #c33c31 } .failed { border-color: #777 }
"""
FILTERS = "".join(f"#show-{kind}:checked ~ main article:not(.{kind}) {{ display: none }}\n" for kind in KINDS)


def render(page: list[Entry], name: str, names: list[str], assets: list[Entry]) -> str:
    """The HTML of one page.

    Args:
        page: the entries of this page. name: its file.
        names: the files of all pages. assets: the entries of all pages, which are counted above.
    """
    counts = Counter(asset.kind for asset in assets)
    radios = "".join(
        f'<input type="radio" name="show" id="show-{kind}"{" checked" * (kind == "all")}>'
        f'<label for="show-{kind}">{kind} ({number})</label>\n'
        for kind, number in (("all", len(assets)), *((kind, counts[kind]) for kind in KINDS))
    )
    links = " ".join(
        f"<b>{number}</b>" if each == name else f'<a href="{each}">{number}</a>'
        for number, each in enumerate(names, 1)
    )
    pages = f"<nav>Page {links}. Counts are of all pages, the filter of this one.</nav>" * (len(names) > 1)
    cards = "\n".join(map(card, page))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>im3d batch</title>
<meta http-equiv="Content-Security-Policy" content="script-src 'none'; object-src 'none'; base-uri 'none'">
<style>{STYLE}{FILTERS}</style></head>
<body><h1>im3d batch</h1>
{pages}
{radios}<main>
{cards}
</main></body></html>
"""


def card(asset: Entry) -> str:
    """The HTML of one asset: its front view, which links to its turntable, its prompt and its verdict."""
    place = f"{ASSETS}/{asset.name}"
    if asset.kind == FAILED:
        picture, numbers, links = "", "", f'<a href="{place}/{ERROR}">error</a>'
    else:
        front = f'<img src="{place}/images/000.png" alt="" loading="lazy">'
        picture = f'<a href="{place}/turntable.mp4">{front}</a>'
        page = f' <a href="{place}/{PAGE}">3D</a>' if asset.has_page else ""
        numbers = f", {asset.psnr:.1f} dB, {asset.seconds['total']:.0f} s"
        links = (
            f'<a href="{place}/turntable.mp4">turntable</a> <a href="{place}/views.png">views</a>'
            f' <a href="{place}/{REPORT}">report</a>{page}'
        )
    prompt = escape(str(asset.told.get("prompt") or asset.told.get("image")))
    reasons = "".join(f"<p>{escape(str(reason))}</p>" for reason in asset.reasons)
    seed = escape(str(asset.told.get("seed")))
    return (
        f'<article class="{asset.kind}" id="{asset.name}">{picture}<p>{prompt}</p>'
        f"<p><b>{asset.kind}</b>{numbers}</p>"
        f"<small>{reasons}<p>{asset.name}, seed {seed}: {links}</p></small></article>"
    )
