"""`im3d dataset show`: what is printed and drawn."""

import numpy as np
import pytest

from recon_torch.views.images import read_image, write_image

pytestmark = pytest.mark.slow


def test_a_contact_sheet_has_a_row_for_each_object(world, rendered, tmp_path, capsys, user_error):
    source = world.build(rendered, tmp_path / "data")
    write_image(tmp_path / "mine.png", np.zeros((4, 4, 3)))
    with user_error("mine.png is not of an earlier run"):
        world.run("show", tmp_path / "data", "--out", tmp_path / "mine.png")
    world.run("show", tmp_path / "data", "--out", tmp_path / "sheet.png", "--objects", 1)
    world.run("show", tmp_path / "data", "--out", tmp_path / "sheet.png", "--objects", 3)
    sheet = read_image(tmp_path / "sheet.png")
    tile = 96
    assert sheet.shape[0] == 3 * (tile + 2) + 2
    left = sheet.shape[1] - world.views * (tile + 2)
    shown = sheet[2 : 2 + tile : 6, left : left + tile : 6]  # the first view, whose pixels are 6 wide
    alpha = source[0]["alpha"][0]
    np.testing.assert_allclose(shown, source[0]["rgb"][0] - 0.25 * (1 - alpha), atol=0.51 / 255)
    printed = capsys.readouterr().out
    assert f"{world.objects} in train" in printed and f"{world.views} views of {world.size} px" in printed
    assert source.metadata["sources"]["sha256"] in printed and f"{world.objects} objects, 0 with" in printed
    assert all(source[n]["caption"] in printed for n in (0, 2, 5))
