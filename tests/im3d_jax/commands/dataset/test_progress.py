"""Progress in a log."""

from im3d_jax.commands.dataset import progress


def test_progress_in_a_log_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0)
    assert list(progress.progress("abc", 5, initial=2)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("/s")[0].rsplit(" ", 1)[0] for line in lines] == [f"objects {n}/5" for n in (3, 4, 5)]
    assert lines[-1].endswith("ETA 00:00")
