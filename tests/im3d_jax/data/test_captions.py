"""Tables of captions, as scripts and spreadsheets write them."""

import pytest

from im3d_jax.data.captions import read_captions
from recon_torch.errors import UserError

TABLES = {
    "plain": 'a/box,"a box, grey"\nother, a cat \n',
    "a byte-order mark and a Windows editor": '\ufeffa/box,"a box, grey"\r\n\r\n \r\nother,a cat\r\n',
    "an old Mac": 'a/box,"a box, grey"\rother,a cat\r',
    "semicolons and quotes": '"a/box";"a box, grey"\n"other";"a cat"\n',
    "semicolons": "a/box;a box, grey\nother;a cat\n",
    "tabs": "a/box\ta box, grey\n\nother\ta cat\n",
    "paths of files": './a/box.glb,"a box, grey"\nother.OBJ,a cat\n',
    "paths on Windows": 'a\\box.glb,"a box, grey"\nother.ply,a cat\n',
}


@pytest.mark.parametrize("kind", TABLES)
def test_captions_are_read_by_name(kind, tmp_path):
    (tmp_path / "captions.csv").write_bytes(TABLES[kind].encode())
    captions = read_captions(tmp_path / "captions.csv")
    assert (captions["a/box"], captions["other"]) == ("a box, grey", "a cat")


def test_a_caption_may_hold_what_parts_other_tables(tmp_path):
    (tmp_path / "captions.csv").write_text("a,red; green\nlong-name,blue; grey\n")
    assert read_captions(tmp_path / "captions.csv") == {"a": "red; green", "long-name": "blue; grey"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,one\n\nb,two, three\n", "row 3: not name,caption"),
        ("a;one\nb;two; three\nc;four\n", "row 2: not name,caption"),
        ("a,one\na.glb,two\n", "row 2: 'a' has another caption"),
        ("\n \n", "has no captions"),
        ('a,"a red car\nb,a duck\n', "quotes that do not close"),
        ('a,"a red car\nb,"a duck"\n', "quotes that do not close"),
        (b"a,caf\xe9\n", "line 1: is not UTF-8"),
    ],
)
def test_captions_that_are_no_table_are_refused(content, message, tmp_path, user_error):
    path = tmp_path / "captions.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with user_error(message):
        read_captions(path)
    with pytest.raises(UserError, match=r"none\.csv cannot be read"):
        read_captions(tmp_path / "none.csv")
