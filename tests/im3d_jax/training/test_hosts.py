"""Processes that really join, disagree, are signalled, hang and wait in vain, each on two virtual devices."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from im3d_jax.training import hosts
from recon_torch import locks
from recon_torch.errors import CommandParser, UserError

pytestmark = pytest.mark.slow

LOOP = """
import sys, time
import jax
from jax.experimental import multihost_utils
from im3d_jax import main
from im3d_jax.training import hosts
from recon_torch import locks
from recon_torch.errors import CommandParser

def hang_here():
    time.sleep(100)

def loop(argv):
    parser = CommandParser("loop", "steps that do nothing, on all devices")
    hosts.add_flags(parser)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--late-s", type=float, default=0)
    parser.add_argument("--agree-s", type=float, default=60)
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--timeout-s", type=float, default=60)
    parser.add_argument("--hold")
    flags = parser.parse_args(argv)
    hosts.initialize(flags)
    time.sleep(flags.late_s)
    hosts.agree({"config.seed": flags.seed, **hosts.versions()}, flags.agree_s)
    if flags.hold:
        with hosts.on_main(lambda: locks.hold(flags.hold)):
            print("holds", flush=True)
        return
    print("main" if hosts.is_main() else "other", len(jax.devices()), "devices", flush=True)
    with hosts.StopSignal() as stop, hosts.Watchdog(flags.timeout_s) as watchdog:
        for step in range(1, 2000):
            time.sleep(0.01)
            multihost_utils.sync_global_devices("step")
            watchdog.beat(step)
            if step == 3:
                print("runs", flush=True)
            if step == flags.hang_at:
                hang_here()
            if stop.at(step):
                print(f"stops at {step}", flush=True)
                sys.exit(hosts.EXIT_REQUEUE)

main.dispatch = loop
sys.exit(main.run(sys.argv[1:]))
"""


def start(*flags):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", LOOP, *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_two(*flags, second=()):
    address = f"localhost:{free_port()}"
    joined = [("--coordinator", address, "--num-processes", "2", "--process-id", str(i)) for i in range(2)]
    return start(*joined[0], *flags), start(*joined[1], *flags, *second)


def wait(*processes):
    """(exit code, stdout, stderr) of each."""
    try:
        texts = [process.communicate(timeout=50) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def wait_for(process, word):
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"ended before {word!r}: {process.stderr.read()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number):
    processes = start_two()
    for process in processes:
        wait_for(process, "runs")
    processes[1].send_signal(number)
    results = wait(*processes)
    assert [code for code, _, _ in results] == [hosts.EXIT_REQUEUE] * 2, results
    steps = {re.search(r"stops at (\d+)", stdout)[1] for _, stdout, _ in results}
    assert len(steps) == 1 and int(steps.pop()) >= 3


def test_processes_that_differ_all_say_in_what():
    for code, stdout, stderr in wait(*start_two("--seed=7", second=["--seed=8"])):
        assert code == 2 and "devices" not in stdout
        message = "im3d: error: the processes differ in config.seed (7 on 0; 8 on 1); start all"
        assert [line for line in stderr.splitlines() if line.startswith(message)], stderr


def test_what_process_0_is_refused_ends_all(tmp_path):
    """Process 0 alone holds the directory of a run: the second is not locked out by it."""
    assert [(code, out) for code, out, _ in wait(*start_two("--hold", str(tmp_path)))] == [(0, "holds\n")] * 2
    with locks.hold(tmp_path):
        for code, stdout, stderr in wait(*start_two("--hold", str(tmp_path))):
            assert code == 2 and not stdout
            assert f"im3d: error: {tmp_path} is in use by process {os.getpid()} on" in stderr


def test_a_process_that_does_not_come_to_agree():
    for code, stdout, stderr in wait(*start_two("--agree-s=1", second=["--late-s=3"])):
        assert code == 2 and "devices" not in stdout
        assert "im3d: error: not all processes compared their settings within 1 s: " in stderr


def test_all_processes_report_a_hang_and_one_stack_shows_where():
    """Process 1 hangs after step 4; process 0 waits for it in the collective of step 5."""
    results = wait(*start_two("--timeout-s=2", second=["--hang-at=4"]))
    for process, (code, stdout, stderr) in enumerate(results):
        role = ["main", "other"][process]
        assert code == hosts.EXIT_HUNG and f"{role} 4 devices" in stdout, stderr
        where = f"host {socket.gethostname()}, process {process} of 2: no step for 2 s since step 4"
        assert f"im3d: hung: {where}" in stderr
        assert ("in hang_here" in stderr) == (process == 1)
        assert ("in sync_global_devices" in stderr) == (process == 0)


def test_a_suspended_process_is_not_hung():
    process = start("--timeout-s=1")
    wait_for(process, "runs")
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    ((code, stdout, stderr),) = wait(process)
    assert code == hosts.EXIT_REQUEUE and "stops at" in stdout, stderr


def test_a_scheduler_that_is_not_there():
    ((code, _, stderr),) = wait(start("--cluster=slurm"))
    assert code == 2 and "im3d: error: --cluster slurm: JAX finds no such cluster here" in stderr


def parsed(*argv):
    parser = CommandParser("train", "")
    hosts.add_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--coordinator=a:1 --num-processes=2", "--process-id is missing"),
        ("--process-id=0", "--coordinator is missing"),
        ("--coordinator=a:1 --num-processes=2 --process-id=2", "--process-id 2 .* 0 to 1"),
        ("--coordinator=a --num-processes=2 --process-id=1", "'a' is not HOST:PORT"),
        ("--cluster=slurm --num-processes=2", "not both"),
    ],
)
def test_flags_that_do_not_fit(flags, words, user_error):
    with user_error(words):
        hosts.initialize(parsed(*flags.split()))


@pytest.mark.parametrize("cluster", ["slurm", "auto"])
def test_the_shell_of_an_interactive_allocation_is_no_task(cluster, monkeypatch, user_error):
    """JAX would wait five minutes there for the other tasks of the allocation."""
    for name, value in dict(STEP_ID="4294967290", PROCID="0", NTASKS="2").items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with user_error(f"--cluster {cluster}: this shell is one process .* put `srun` before the command"):
        hosts.initialize(parsed(f"--cluster={cluster}"))


def test_a_coordinator_that_does_not_answer():
    address = f"localhost:{free_port()}"
    flags = f"--coordinator={address} --num-processes=2 --process-id=1 --connect-timeout-s=1"
    with pytest.raises(UserError, match=f"no coordinator at {address} for 1 s .*refused"):
        hosts.initialize(parsed(*flags.split()))


def test_one_process_alone():
    hosts.initialize(parsed())
    hosts.agree({"config.seed": "7"})
    assert hosts.is_main()


def test_differences_name_the_fact_the_values_and_who_holds_them():
    same = {"config.seed": "7", "jax": "1"}
    assert hosts.difference([same, dict(same)]) is None
    found = hosts.difference([same, same | {"jax": "2"}, same | {"code": "c"}])
    assert found == "the processes differ in code (absent on 0, 1; c on 2), jax (1 on 0, 2; 2 on 1)"
    found = hosts.difference([{"jax": "1"}] * 70 + [{"jax": "2"}])
    assert found == "the processes differ in jax (1 on 0, 1, 2, 3, ...; 2 on 70)"


def test_the_code_version_changes_with_a_source(tmp_path, monkeypatch):
    (tmp_path / "im3d_jax" / "training").mkdir(parents=True)
    monkeypatch.setattr(hosts, "__file__", str(tmp_path / "im3d_jax" / "training" / "hosts.py"))
    seen = {hosts.versions()["code"]}
    for name in ("a.py", "training/a.py"):
        (tmp_path / "im3d_jax" / name).write_text("")
        seen.add(hosts.versions()["code"])
    (tmp_path / "im3d_jax" / "a.py").write_text("1")
    seen.add(hosts.versions()["code"])
    assert len(seen) == 4
    (tmp_path / "im3d_jax" / "notes.txt").write_text("not code")
    assert hosts.versions()["code"] in seen


def test_a_second_interrupt_ends_at_once(capfd):
    before = [signal.getsignal(number) for number in hosts.STOP_SIGNALS]
    with pytest.raises(KeyboardInterrupt), hosts.StopSignal() as stop:
        assert not stop.at(1)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
            assert stop.at(2)
        signal.raise_signal(signal.SIGINT)
    assert "SIGTERM: saves and stops" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in hosts.STOP_SIGNALS] == before
