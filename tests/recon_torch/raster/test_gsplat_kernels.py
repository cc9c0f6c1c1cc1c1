"""What the user hears about gsplat's kernels, with small packages in the place of gsplat."""

import fcntl
import sys
import textwrap
import threading
from types import SimpleNamespace

import pytest

from recon_torch.errors import UserError
from recon_torch.process import protocol, worker
from recon_torch.process.client import ReconClient
from recon_torch.raster import gsplat_kernels
from recon_torch.settings import FitSettings, Representation

COMPILES = """
    import os, pathlib
    pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"], "gsplat_cuda", "gsplat_cuda.so").touch()
    _C = "kernels"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Replaces gsplat by a package with this `cuda._backend`, and this `csrc` if its kernels are built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in loaded_of_gsplat():
        monkeypatch.delitem(sys.modules, name)

    def install(backend, csrc=None):
        package = tmp_path / "site" / "gsplat"
        (package / "cuda").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("def rasterization():\n    return 'rasterized'")
        (package / "cuda" / "__init__.py").touch()
        (package / "cuda" / "_backend.py").write_text(textwrap.dedent(backend))
        if csrc is not None:
            (package / "csrc.py").write_text(csrc)
        restart()

    yield install
    restart()


def restart():
    """Forgets what was imported, as a new process would."""
    gsplat_kernels.load.cache_clear()
    for name in loaded_of_gsplat():
        del sys.modules[name]


def loaded_of_gsplat():
    return [name for name in sys.modules if name.split(".")[0] == "gsplat"]


def test_kernels_that_are_there_are_loaded_in_silence(install, capsys):
    install("_C = 'kernels'", csrc="")
    assert gsplat_kernels.load()() == "rasterized"
    assert capsys.readouterr().err == ""


def test_compiling_is_announced_once_and_says_where(install, capsys, tmp_path):
    install(COMPILES)
    assert gsplat_kernels.load() is gsplat_kernels.load()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("im3d: gsplat compiles its CUDA kernels now")
    assert str(tmp_path / "extensions" / "gsplat_cuda") in line and "TORCH_EXTENSIONS_DIR" in line
    restart()
    gsplat_kernels.load()
    assert capsys.readouterr().err == ""


def test_kernels_of_another_torch_are_said_to_be_so(install):
    install(COMPILES, csrc="raise ImportError('csrc.so: undefined symbol: _ZN3c10')")
    said = []
    gsplat_kernels.load(said.append)
    assert len(said) == 2 and "do not load (csrc.so: undefined symbol: _ZN3c10)" in said[0]


@pytest.mark.parametrize(
    "backend, why",
    [
        ("_C = None", "there is no nvcc;"),
        ("raise RuntimeError('Ninja is required to load')", "Ninja is required to load;"),
        (  # as torch raises it
            "raise RuntimeError('CUDA version (%s) mismatches that of PyTorch (%s).', '11.8', '13.0')",
            r"CUDA version \(11.8\) mismatches that of PyTorch \(13.0\)\.;",
        ),
        (
            "raise RuntimeError('Error building: [1/25] nvcc -c\\na.cu:1: fatal error: no x.h\\nend')",
            "a.cu:1: fatal error: no x.h;",
        ),
        (  # as gsplat does
            """
            try:
                raise PermissionError(13, 'Permission denied', 'nvcc')
            except OSError:
                import gsplat_cuda
            """,
            "Permission denied: 'nvcc';",
        ),
    ],
)
def test_what_cannot_compile_is_one_line(install, backend, why, user_error):
    install(backend)
    with user_error(f"cannot compile them: .*{why} install .*docs/reconstruction.md"):
        gsplat_kernels.load(lambda line: None)


def test_a_place_that_cannot_be_written(install, monkeypatch, tmp_path):
    install(COMPILES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="no place .*file.*: Not a directory; set TORCH_EXTENSIONS_DIR"):
        gsplat_kernels.load()


def test_a_second_process_waits_for_what_the_first_compiles(install, tmp_path):
    install("_C = 'kernels'")
    directory = tmp_path / "extensions" / "gsplat_cuda"
    directory.mkdir(parents=True)
    said = []
    waiting = threading.Thread(target=gsplat_kernels.load, args=(said.append,))
    with open(directory.with_suffix(".lock"), "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        (directory / "gsplat_cuda.so").touch()
    waiting.join()
    assert said == []


def test_the_worker_gives_notice_and_the_client_has_patience(monkeypatch, capsys):
    sent, asked = [], []
    monkeypatch.setattr(gsplat_kernels, "load", lambda announce: announce("compiles"))
    child = worker.Worker(SimpleNamespace(send=sent.append))
    for device, settings in [("cpu", {}), ("cuda", {"representation": Representation.NERF}), ("cuda", {})]:
        child.load_kernels(protocol.Start(None, FitSettings(**settings), device, "", 0.0))
    assert sent == [protocol.Notice("compiles", gsplat_kernels.COMPILE_TIMEOUT_S)]

    replies = iter([protocol.Beat(), *sent, protocol.Beat(), protocol.Done(0, 0, [], {})])
    client = object.__new__(ReconClient)  # without a worker
    answer = client._await_answer(lambda patience_s: asked.append(patience_s) or next(replies), 600.0)
    assert isinstance(answer, protocol.Done)
    assert asked == [600.0, 600.0, 3600.0, 3600.0]
    assert capsys.readouterr().err == "im3d: compiles\n"
