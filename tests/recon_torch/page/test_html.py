"""The page holds what is shown, and what users wrote stays text in it."""

import base64
import gzip
import json
from html.parser import HTMLParser

from recon_torch.page import contents, html
from tests.recon_torch.page.conftest import HOSTILE


class Elements(HTMLParser):
    """All tags in their order, and the text of each script by its id."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts, self._script = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._script = dict(attrs).get("id", "viewer") if tag == "script" else None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def test_text_of_users_is_data_and_no_tag(asset):
    shown = contents.read(asset)
    hostile = Elements(html.render(shown))
    harmless = Elements(html.render(shown._replace(title="a cup", notes=["fine"])))
    assert hostile.tags == harmless.tags
    assert hostile.tags.count("script") == 3
    assert json.loads(hostile.scripts["asset"])["title"] == HOSTILE


def test_the_page_brings_all_that_it_needs(asset):
    page = Elements(html.render(contents.read(asset)))
    held = json.loads(page.scripts["asset"])
    assert base64.b64decode(held["ply"]) == contents.read(asset).ply
    assert len(held["views"]) == 5 and held["views"][0]["picture"].startswith("data:image/png;base64,")
    libraries = gzip.decompress(base64.b64decode(page.scripts["libraries"]))
    assert b"var libraries=" in libraries
    assert not {"link", "iframe", "object"} & set(page.tags)
