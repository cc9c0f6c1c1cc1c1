"""Locks die with their process; what dead processes left is cleared, and only that."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from recon_torch import locks
from recon_torch.errors import UserError

CHILD = """
import sys, time
from recon_torch import locks
directory, what = sys.argv[1:]
with locks.hold_part(directory, 1, 4) if what == "part" else locks.hold(directory):
    owned = locks.OwnedDirectory(".im3d_", directory)
    (owned.path / "half.ply").write_text("half")
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Starts a process that holds tmp_path, or part 1 of 4, and has a directory there. Returns it."""
    started = []

    def start(what="whole"):
        command = [sys.executable, "-c", CHILD, tmp_path, what]
        started.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        )
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def refused(context):
    with pytest.raises(UserError) as error, context:
        pass
    return str(error.value)


def test_a_lock_names_its_process_and_dies_with_it(other, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    process = other()
    message = refused(locks.hold(tmp_path))
    assert f"{tmp_path} is in use by process {process.pid} on {os.uname().nodename}" in message
    assert locks.clear(tmp_path, ".im3d_") == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locks.hold(tmp_path):
        assert locks.clear(tmp_path, ".im3d_") == 1
        assert [path.name for path in tmp_path.iterdir()] == [locks.LOCK]
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == f"im3d: removed what a killed run left in {tmp_path}\n"


def test_parts_are_held_side_by_side_unless_they_share_items(other, tmp_path, monkeypatch):
    """Part 1 of 4 has the items 1, 5, 9, ...; 1 of 2 has them all, 3 of 6 has 9, and 0 of 2 has none."""
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    process = other("part")
    for number, count in ((0, 4), (0, 2), (2, 6)):
        with locks.hold_part(tmp_path, number, count):
            pass
    for number, count in ((1, 4), (1, 2), (3, 6), (0, 3), (0, 1)):
        assert f"process {process.pid} on" in refused(locks.hold_part(tmp_path, number, count))
    process.kill()
    process.wait()
    with locks.hold_part(tmp_path, 0, 1):
        pass


def test_a_thread_may_hold_again_within_and_another_one_may_not(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)
    refusals = []
    with locks.hold(tmp_path):
        with locks.hold(tmp_path):
            pass
        thread = threading.Thread(target=lambda: refusals.append(refused(locks.hold(tmp_path))))
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in refusals[0]
    with locks.hold(tmp_path):
        pass


@pytest.mark.parametrize(
    ("record", "is_free"),
    [
        ({}, True),
        ({"host": os.uname().nodename, "pid": os.getppid()}, False),
        ({"host": os.uname().nodename, "pid": os.getppid(), "started": "0"}, True),
        ({"host": "elsewhere", "pid": 1, "started": "1"}, True),
    ],
)
def test_where_a_file_system_has_no_locks_the_record_counts(tmp_path, monkeypatch, capsys, record, is_free):
    """A living process of this host refuses; one that has gone, whose number another has now, does not."""

    def no_locks(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)
    if record:
        whole = {"started": locks.started(os.getppid()), "since": "then"} | record
        (tmp_path / locks.LOCK).write_text(locks.json.dumps(whole))
    if is_free:
        with locks.hold(tmp_path):
            pass
    else:
        assert f"process {os.getppid()} on" in refused(locks.hold(tmp_path))
    assert ("cannot tell" in capsys.readouterr().err) == (record.get("host") == "elsewhere")


def test_what_is_not_ours_is_not_cleared(tmp_path):
    """A user's own names that begin as ours do, and links."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / locks.OWNER).touch()
    (tmp_path / ".im3d_link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".im3d_backup").mkdir()
    (tmp_path / ".im3d_notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    assert locks.clear(tmp_path, ".im3d_") == 0 and sorted(tmp_path.rglob("*")) == before
    (tmp_path / ".im3d_a1b2c3_4.json").touch()  # as `files.replacing` names them
    assert locks.clear(tmp_path, ".im3d_") == 1 and sorted(tmp_path.rglob("*")) == before


def test_the_sockets_of_multiprocessing_lie_in_the_directory_of_their_process(tmp_path):
    code = (
        "import multiprocessing.util as u; from recon_torch import locks; own = locks.process_directory();"
        "assert own == locks.process_directory(); print(own, u.get_temp_dir())"
    )
    environment = os.environ | {"TMPDIR": "/tmp"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    own, sockets = done.stdout.split()
    assert sockets.startswith(own + "/pymp-") and not os.path.exists(own)
