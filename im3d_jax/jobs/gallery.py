"""What all shards of a batch have made, to look at: gallery.html.

The pages are static and can be opened from a disk: their links are relative, they have no scripts, and all
that users wrote is escaped. Radio buttons and CSS filter them by verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from im3d_jax.jobs import BATCH, ERROR, FAILED
from im3d_jax.jobs.rows import KINDS, Row
from recon_torch import outputs
from recon_torch.asset_files import REPORT
from recon_torch.files import replacing
from recon_torch.outputs import Kind
from recon_torch.page import PAGE

ASSETS_PER_PAGE = 200

PAGES = Kind(BATCH.command, (r"gallery(_\d+)?\.html",), grows=True)


def write(out: Path, rows: Sequence[Row]) -> Path:
    """Writes gallery.html, gallery_2.html, ... of a batch with these assets. Returns the path of the first.

    Pages of an earlier call that are too many are removed. Raises UserError for files of these names that
    are not ours.
    """
    outputs.check(out, BATCH)
    pages = [rows[i : i + ASSETS_PER_PAGE] for i in range(0, max(len(rows), 1), ASSETS_PER_PAGE)]
    names = [page_name(number) for number in range(len(pages))]
    counts = Counter(row.verdict for row in rows)
    for name, page in zip(names, pages, strict=True):
        with replacing(out / name) as temporary:
            temporary.write_text(render(page, name, names, counts), encoding="utf-8", errors="replace")
    for found in outputs.files_of(out, PAGES):
        if found.name not in names:
            found.unlink(missing_ok=True)
    return out / names[0]


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


def render(page: Sequence[Row], name: str, names: Sequence[str], counts: Counter[str]) -> str:
    """The HTML of one page.

    Args:
        page: the assets of this page. name: its file.
        names: the files of all pages. counts: of the verdicts on the assets of all pages.
    """
    radios = "".join(
        f'<input type="radio" name="show" id="show-{kind}"{" checked" * (kind == "all")}>'
        f'<label for="show-{kind}">{kind} ({number})</label>\n'
        for kind, number in (("all", counts.total()), *((kind, counts[kind]) for kind in KINDS))
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


def card(row: Row) -> str:
    """The HTML of one asset: its front view, which links to its turntable, its prompt and its verdict."""
    place = row.path
    if row.verdict == FAILED:
        picture, numbers, links = "", "", f'<a href="{place}/{ERROR}">error</a>'
    else:
        front = f'<img src="{place}/images/000.png" alt="" loading="lazy">'
        picture = f'<a href="{place}/turntable.mp4">{front}</a>'
        page = f' <a href="{place}/{PAGE}">3D</a>' if row.has_page else ""
        numbers = f", {row.scores['psnr']:.1f} dB, {row.seconds['total']:.0f} s"
        links = (
            f'<a href="{place}/turntable.mp4">turntable</a> <a href="{place}/views.png">views</a>'
            f' <a href="{place}/{REPORT}">report</a>{page}'
        )
    against = [row.error] if row.verdict == FAILED else [*row.reasons, *row.hints]
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in against)
    return (
        f'<article class="{row.verdict}" id="{row.name}">{picture}<p>{escape(row.prompt or row.image)}</p>'
        f"<p><b>{row.verdict}</b>{numbers}</p>"
        f"<small>{reasons}<p>{row.name}, seed {row.seed}: {links}</p></small></article>"
    )
