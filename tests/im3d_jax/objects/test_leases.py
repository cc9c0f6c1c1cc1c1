"""Of all who want a lease one has it, as long as it lives; who has died is told from who is slow."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from im3d_jax.objects import leases
from im3d_jax.objects.leases import Times, held
from im3d_jax.objects.store import ObjectStore
from im3d_jax.objects.urls import parse
from recon_torch.errors import UserError
from recon_torch.locks import InUse

QUICK = Times(beat_s=0.05, expiry_s=0.4, late_s=0.25, turn_s=0.01)


def same(name):
    return name == "table"


@pytest.fixture
def store(tmp_path):
    return ObjectStore(parse(f"memory://{tmp_path}/run"), sleep=lambda seconds: None)


def take(store, **options):
    return held(store, "table", same, **{"times": QUICK} | options)


def leave(store, monkeypatch, pid=None, machine=None):
    """Writes the lease of a process that has gone, by default of one on another machine."""
    told = json.loads(leases._record())  # noqa: SLF001
    told |= {"host": "node7", "machine": machine or "another", "pid": pid or 4127}
    store.write(f"{leases.FOLDER}/table.0123.json", json.dumps(told).encode())


def test_a_holder_that_lives_is_named(store, user_error):
    with take(store) as key:
        assert store.stat(key) and leases.held_now(store) == {"table": str_of(store, key)}
        begun = time.monotonic()
        with (
            pytest.raises(InUse, match=f"is in use by process {os.getpid()} on .* since 20.*; wait"),
            take(store),
        ):
            pass
        assert time.monotonic() - begun < QUICK.expiry_s  # it was seen to live
        with pytest.raises(InUse), take(store, patience_s=0.0):
            pass
    assert store.files(leases.FOLDER) == {}
    with take(store, patience_s=0.0):
        pass


def str_of(store, key):
    told = json.loads(store.read(key))
    return f"process {told['pid']} on {told['host']} since {told['since']}"


def test_who_has_patience_waits_for_the_end(store):
    ended = threading.Event()

    def hold():
        with take(store):
            ended.wait()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(hold)
        while not store.files(leases.FOLDER):
            time.sleep(0.01)
        threading.Timer(0.1, ended.set).start()
        with take(store, patience_s=10.0):
            assert ended.is_set()


def test_of_many_that_come_at_once_one_has_it(store):
    inside, most, errors = 0, 0, []
    guard = threading.Lock()

    def work(number):
        nonlocal inside, most
        try:
            with take(store, patience_s=30.0, times=QUICK._replace(expiry_s=30.0, late_s=30.0)):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.01)
                with guard:
                    inside -= 1
        except UserError as error:
            errors.append(error)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(12)))
    assert most == 1 and not errors and store.files(leases.FOLDER) == {}


def test_one_of_another_machine_expires(store, monkeypatch):
    leave(store, monkeypatch)
    begun = time.monotonic()
    with take(store):
        assert time.monotonic() - begun > 0.8 * QUICK.expiry_s
        assert len(store.files(leases.FOLDER)) == 1


def test_one_of_this_machine_ends_with_its_process(store, monkeypatch):
    leave(store, monkeypatch, pid=2**22 + 1, machine=leases.machine())
    with take(store, patience_s=0.0, times=QUICK._replace(expiry_s=1000.0)):
        assert len(store.files(leases.FOLDER)) == 1


def test_what_is_no_lease_of_ours_expires_too(store):
    store.write(f"{leases.FOLDER}/table.x.json", b"[]")
    with pytest.raises(InUse, match="in use by another process"), take(store, patience_s=0.0):
        pass
    with take(store):
        pass


def test_a_holder_that_comes_late_keeps_what_nobody_has_taken(store, monkeypatch):
    lost = threading.Event()
    with take(store, lost=lost.set) as key:
        down(store, monkeypatch, seconds=2 * QUICK.late_s)
        wait_for(lambda: key not in names(store) and names(store))
        assert not lost.is_set() and len(names(store)) == 1


def test_a_holder_that_comes_too_late_is_told(store, monkeypatch):
    lost = threading.Event()
    other = ObjectStore(store.url)
    words = "went to process .* nothing could be written there"
    with pytest.raises(UserError, match=words), take(store, lost=lost.set):
        down(store, monkeypatch, seconds=2 * QUICK.expiry_s)
        with take(other):
            assert lost.wait(10)
    assert names(store) == set()


def down(store, monkeypatch, seconds):
    """The store does not answer for so long."""
    until, write = time.monotonic() + seconds, store.write

    def late(*arguments, **options):
        if time.monotonic() < until:
            raise UserError("no answer")
        write(*arguments, **options)

    monkeypatch.setattr(store, "write", late)


def names(store):
    return {f"{leases.FOLDER}/{name}" for name in store.files(leases.FOLDER)}


def wait_for(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_on_a_real_store(bucket):
    store = ObjectStore(parse(f"{bucket}/run"))
    with take(store, times=leases.TIMES), pytest.raises(InUse), take(store, patience_s=0.0):
        pass
    assert store.files(leases.FOLDER) == {}
