"""An address at which nobody listens is one line at once, without Ray."""

import socket

import pytest

from recon_torch.errors import UserError

ray = pytest.importorskip("ray")


def test_an_address_at_which_nobody_listens(monkeypatch):
    from im3d_jax.cluster.crew import connected

    def init(**options):
        raise AssertionError("Ray would try for minutes")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        address = "{}:{}".format(*free.getsockname())
        for wrong in (address, "127.0.0.1:99999", "no-such-host.invalid:1"):
            with pytest.raises(UserError, match=f"^no Ray cluster at '{wrong}': .+$"), connected(wrong):
                pass
