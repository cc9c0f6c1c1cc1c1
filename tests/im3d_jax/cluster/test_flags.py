"""The flags of a cluster: what they mean, and the one line for those that mean nothing."""

import pytest

from im3d_jax import main
from im3d_jax.cluster.flags import actor_range, node_labels
from recon_torch.errors import UserError


@pytest.mark.parametrize(
    "text, expected",
    [(None, (1, 0)), ("64", (64, 64)), ("4:64", (4, 64)), ("4:", (4, 0)), (":8", (1, 8)), ("3:3", (3, 3))],
)
def test_ranges_of_actors(text, expected):
    assert actor_range(text) == expected


@pytest.mark.parametrize("text", ["", ":", "a", "4:2", "0", "0:4", "-1", "1:2:3", "1.5", "4:200000", "٣"])
def test_ranges_of_actors_that_cannot_be(text):
    with pytest.raises(UserError, match="--actors is"):
        actor_range(text)


def test_labels_of_nodes():
    assert node_labels("ray.io/accelerator-type=H100, zone=a-1") == {
        "ray.io/accelerator-type": "H100",
        "zone": "a-1",
    }
    assert node_labels(None) == {}
    for wrong in ("H100", "a=", "=b", "a=b c", "a=in(b)"):
        with pytest.raises(UserError, match="--node-labels has"):
            node_labels(wrong)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--actors", "4"], "--actors goes with --ray"),
        (["--gpus-per-actor", "0.5"], "--gpus-per-actor goes with --ray"),
        (["--asset-timeout-s", "9"], "--asset-timeout-s goes with --ray"),
        (["--ray", "--shard", "0/2"], "--shard does not go with --ray"),
        (["--ray", "ray://head:10001"], "--ray takes no ray:// address"),
        (["--ray", "head"], "--ray is 'head'; give auto, local, or HOST:PORT"),
        (["--ray", "local", "--actors", "9:3"], "--actors is '9:3'"),
        (["--ray", "--node-labels", "H100"], "--node-labels has 'H100'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_loads(flags, line, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a duck\n")
    out = tmp_path / "out"
    assert main.run(["batch", f"--prompts={tmp_path / 'p.txt'}", f"--out={out}", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"im3d: error: {line}") and "\n" not in error and not out.exists()
