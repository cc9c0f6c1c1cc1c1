"""The command line: exit codes and the one line that a user sees."""

import errno
import importlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import im3d_jax
from im3d_jax import main
from recon_torch.errors import CommandParser, UserError


@pytest.fixture
def command(monkeypatch):
    """Installs a function as the module of the command `probe`."""

    def install(function):
        monkeypatch.setitem(main.COMMANDS, "probe", main.Command("probe_module", "for this test"))
        monkeypatch.setitem(sys.modules, "probe_module", SimpleNamespace(main=function))

    return install


def test_arguments_reach_the_command(command):
    seen = []
    command(seen.append)
    assert main.run(["probe", "--a", "b"]) == 0
    assert seen == [["--a", "b"]]


def test_unknown_command_names_the_nearest(capsys):
    assert main.run(["genrate"]) == 2
    assert capsys.readouterr().err == "im3d: error: unknown command 'genrate': did you mean 'generate'?\n"


def test_user_error_is_one_line_and_code_2(command, capsys):
    def fail(argv):
        raise UserError("no image at x.png; give --image FILE")

    command(fail)
    assert main.run(["probe"]) == 2
    assert capsys.readouterr().err == "im3d: error: no image at x.png; give --image FILE\n"


def test_bug_keeps_its_traceback(command):
    def fail(argv):
        raise ValueError("a bug")

    command(fail)
    with pytest.raises(ValueError, match="a bug"):
        main.run(["probe"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x.bin"),
        ValueError("code 28: No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_whichever_library_says_so(command, capsys, error):
    def fail(argv):
        raise error

    command(fail)
    assert main.run(["probe"]) == 2
    where = ": x.bin" if isinstance(error, OSError) else ""
    assert capsys.readouterr().err == f"im3d: error: No space left on device{where}; make room and go on\n"


def test_interrupt_is_130(command):
    def interrupt(argv):
        raise KeyboardInterrupt

    command(interrupt)
    assert main.run(["probe"]) == 130


@pytest.fixture
def no_reader(monkeypatch):
    """Makes stdout or stderr a pipe whose reader has ended, as `| head` does."""
    opened = []

    def install(name):
        reader, writer = os.pipe()
        os.close(reader)
        opened.append(os.fdopen(writer, "w", buffering=1))
        monkeypatch.setattr(sys, name, opened[-1])

    yield install
    for stream in opened:
        stream.close()  # what is left in it goes nowhere, without an error


def end(argv):
    print("usage")
    raise SystemExit(0)


@pytest.mark.parametrize("printing", [lambda argv: print("a line"), end])
def test_output_that_nobody_reads_any_more_ends_the_command_quietly(command, no_reader, printing, capsys):
    no_reader("stdout")
    command(printing)
    assert main.run(["probe"]) == 141
    assert capsys.readouterr().err == ""


def test_an_error_that_nobody_reads_ends_the_command_quietly(no_reader):
    no_reader("stderr")
    assert main.run(["genrate"]) == 141


def test_an_empty_picture_beside_a_prompt_is_not_passed_over(capsys):
    assert main.run(["generate", "--prompt", "a red mug", "--image", "", "--out", "never"]) == 2
    assert "--image is empty" in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_escaped(command, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    command(lambda argv: print("caf\xe9 \u0447\udce9"))
    assert main.run(["probe"]) == 0
    assert written.getvalue() == b"caf\xe9 \\u0447\\udce9\n"


def test_another_broken_pipe_is_a_bug(command):
    def fail(argv):
        raise BrokenPipeError

    command(fail)
    with pytest.raises(BrokenPipeError):
        main.run(["probe"])


def test_wrong_flag_is_a_user_error():
    parser = CommandParser("probe", "for this test")
    parser.add_argument("--size", type=int)
    for argv in (["--size", "big"], ["--siz", "3"]):
        with pytest.raises(UserError, match=r"see `im3d probe --help`"):
            parser.parse_args(argv)


def test_help_as_a_module_lists_commands_and_loads_no_framework():
    script = (
        "import sys, im3d_jax.main as m; m.run(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('jax', 'torch')))"
    )
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    module = subprocess.run(
        [sys.executable, "-m", "im3d_jax"], capture_output=True, text=True, check=True
    ).stdout
    assert listed == module
    assert all(name in listed for name in main.COMMANDS)


def test_completion_offers_the_public_names():
    assert dir(im3d_jax) == ["Asset", "Pipeline", "UserError", "load"]


def test_modules_of_the_working_directory_are_found(command, monkeypatch, tmp_path):
    """The script `im3d` has its own directory, not the working directory, on Python's path."""
    (tmp_path / "module_of_a_user.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    command(lambda argv: importlib.import_module("module_of_a_user"))
    assert main.run(["probe"]) == 0


def test_a_path_that_is_too_long_is_one_line(command, capsys):
    command(lambda argv: os.stat("a" * 5000))
    assert main.run(["probe"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("im3d: error: File name too long: ") and told.count("\n") == 1 and len(told) < 300
