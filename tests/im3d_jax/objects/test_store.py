"""Objects are listed, read and written; what does not answer is tried again, and what cannot be is said."""

import pickle
import time

import pytest

from im3d_jax.objects import store as store_module
from im3d_jax.objects.store import TRIES, ObjectStore
from im3d_jax.objects.urls import parse


@pytest.fixture(params=["memory", "file", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        url = f"{request.getfixturevalue('bucket')}/some/run"
    else:
        url = f"{request.param}://{tmp_path}/run"
    return ObjectStore(parse(url), sleep=lambda seconds: None)


def test_objects_come_back(store, tmp_path):
    assert store.tree() == store.files() == {} and store.folders("assets") == []
    begun_ns = time.time_ns()
    for name in ("job.json", "assets/000000/a.bin", "assets/000000/images/0.png", "assets/000107/a.bin"):
        store.write(name, name.encode())
    (tmp_path / "page.html").write_text("<p>")
    store.put(tmp_path / "page.html", "page.html")
    assert set(store.files()) == {"job.json", "page.html"}
    assert store.folders("assets") == ["000000", "000107"]
    tree = store.tree("assets")
    assert set(tree) == {"000000/a.bin", "000000/images/0.png", "000107/a.bin"}
    assert set(store.tree("assets", "0000")) == {"000000/a.bin", "000000/images/0.png"}
    entry = tree["000000/a.bin"]
    assert entry.size == len("assets/000000/a.bin") and store.stat("assets/000000/a.bin") == entry
    assert -2e9 < entry.mtime_ns - begun_ns < 60e9  # S3 tells whole seconds
    assert pickle.loads(pickle.dumps(store)).read("job.json") == b"job.json"
    store.get("job.json", tmp_path / "new/job.json")
    assert (tmp_path / "new/job.json").read_text() == "job.json"
    for _ in range(2):
        store.remove("job.json")
    assert store.stat("job.json") is None
    with pytest.raises(FileNotFoundError):
        store.read("job.json")


def test_browsers_are_told_what_a_page_is(bucket, tmp_path):
    import s3fs

    (tmp_path / "page.html").write_text("<p>")
    ObjectStore(parse(bucket)).put(tmp_path / "page.html", "page.html")
    info = s3fs.S3FileSystem(skip_instance_cache=True).info(f"{bucket}/page.html")
    assert info["ContentType"] == "text/html"


def failing(store, monkeypatch, name, errors):
    """Lets the next calls fail. Returns the pauses that follow."""
    pauses, function = [], getattr(store._fs, name)  # noqa: SLF001

    def fail(*arguments, **keywords):
        if errors:
            raise errors.pop(0)
        return function(*arguments, **keywords)

    monkeypatch.setattr(store._fs, name, fail)  # noqa: SLF001
    monkeypatch.setattr(store, "_sleep", pauses.append)
    return pauses


@pytest.fixture
def memory(tmp_path):
    return ObjectStore(parse(f"memory://{tmp_path}"))


def test_an_upload_that_fails_twice_is_made(memory, monkeypatch):
    pauses = failing(memory, monkeypatch, "pipe_file", [OSError("slow down"), TimeoutError()])
    memory.write("a", b"1")
    assert memory.read("a") == b"1" and len(pauses) == 2
    assert 0.25 <= pauses[0] <= 0.5 <= pauses[1] <= 1


def test_tries_have_an_end(memory, monkeypatch, user_error):
    pauses = failing(memory, monkeypatch, "pipe_file", [OSError("slow down")] * 99)
    with user_error(f"cannot write memory://.*/a: slow down; tried {TRIES} times; give the same command"):
        memory.write("a", b"1")
    assert len(pauses) == TRIES - 1 and max(pauses) <= 20 and 20 < sum(pauses) < 60


@pytest.mark.parametrize(
    "error, words",
    [
        (PermissionError("Access Denied"), r"no permission \(Access Denied\); check the credentials"),
        (type("NoCredentialsError", (Exception,), {})("none"), "no permission"),
        (FileNotFoundError("The specified bucket does not exist"), "the bucket .* does not exist"),
        (NotImplementedError(), "memory:// does not allow it"),
    ],
)
def test_what_no_try_can_change_is_tried_once(memory, error, words, monkeypatch, user_error):
    pauses = failing(memory, monkeypatch, "pipe_file", [error])
    with user_error(f"cannot write .*: {words}"):
        memory.write("a", b"1")
    assert not pauses


def test_a_bug_keeps_its_traceback(memory, monkeypatch):
    failing(memory, monkeypatch, "pipe_file", [TypeError("a bug")])
    with pytest.raises(TypeError, match="a bug"):
        memory.write("a", b"1")


def test_a_bucket_that_is_not_there(bucket, user_error):
    store = ObjectStore(parse(f"{bucket}-of-another/run"))
    for call in (store.files, store.tree, lambda: store.write("a", b"")):
        with user_error(f"the bucket {bucket[5:]}-of-another does not exist"):
            call()


def test_a_store_that_does_not_answer(monkeypatch, bucket, user_error):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = ObjectStore(parse(f"{bucket}/run"), sleep=lambda seconds: None)
    with user_error("Could not connect to the endpoint URL.*; tried 3 times"):
        store.files(tries=3)


def test_no_credentials(monkeypatch, bucket, tmp_path, user_error):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    store = ObjectStore(parse(f"{bucket}/run"))
    with user_error("no permission"):
        store.files()


def test_a_package_that_is_missing(monkeypatch, user_error):
    import fsspec

    def missing(*arguments, **keywords):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with user_error(r's3:// needs a package that is not installed: pip install "im3d\[storage\]"'):
        ObjectStore(parse("s3://bucket/x"))


def test_stores_do_not_try_again_by_themselves(bucket):
    fs = store_module._file_system(parse(bucket))  # noqa: SLF001
    assert fs.retries == 1 and fs.config_kwargs["retries"]["total_max_attempts"] == 1
