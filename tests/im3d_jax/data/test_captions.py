"""Tables of captions."""

import pytest

from im3d_jax.data.captions import read_captions
from recon_torch.errors import UserError


def test_captions_are_read_by_name(tmp_path):
    (tmp_path / "captions.csv").write_text('a/box,"a box, grey"\nother, a cat \n')
    assert read_captions(tmp_path / "captions.csv") == {"a/box": "a box, grey", "other": "a cat"}


def test_captions_that_are_no_table_are_refused(tmp_path):
    (tmp_path / "captions.csv").write_text("a,one\nb,two, three\n")
    with pytest.raises(UserError, match="row 2: not name,caption"):
        read_captions(tmp_path / "captions.csv")
    with pytest.raises(UserError, match="cannot read captions from .*none.csv"):
        read_captions(tmp_path / "none.csv")
