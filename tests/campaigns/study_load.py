"""Fifty annotators at once answer a study of the paper's size, while its server is killed and started again.

    python tests/campaigns/study_load.py                                     # SQLite
    python tests/campaigns/study_load.py --database postgresql:///study      # an empty database of PostgreSQL

39 prompts, 5 pairs of methods, 2 questions, 5 annotators an item: 1,950 answers, and checks (A.2). Each
annotator has a connection of its own, asks, loads the beginning of a video, answers, and sends every fifth
answer twice, the second time with the other choice, and goes on until nothing is left. After a third and
after two thirds of the answers the server is killed by SIGKILL and started again. Then what annotators were
told is compared with what is kept.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from im3d_jax.study import ANNOTATORS, FILES, STUDY, annotators, drawing, media, plan, sources  # noqa: E402
from im3d_jax.study.store import Store, default_url  # noqa: E402

NUM_ANNOTATORS, NUM_PROMPTS, BASELINES = 50, 39, 5
KILL_AT = (650, 1300)
"""The server is killed when so many answers were acknowledged."""


@dataclass
class Told:
    """What annotators were told. kept: the choice that stands by annotator and item."""

    kept: dict[tuple[str, str], str] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    num_retries: int = 0
    num_twice: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def make_study(directory: Path) -> plan.Study:
    """A study whose videos are a few random bytes: no browser plays them here."""

    def write(_source: object, target: Path, *_: object) -> None:
        target.write_bytes(random.Random(target.name).randbytes(20_000))

    prompts = {
        f"prompt {n}": sources.Turntable(f"prompt {n}", (Path("none.mp4"),)) for n in range(NUM_PROMPTS)
    }
    methods = ["ours", *(f"baseline{n}" for n in range(BASELINES))]
    (directory / FILES).mkdir()
    with mock.patch.object(media, "write_video", write), mock.patch.object(media, "write_broken", write):
        found = [sources.Source(name, dict(prompts)) for name in methods]
        settings = drawing.Settings(num_annotators=NUM_ANNOTATORS)
        study = drawing.draw(found, {}, settings, directory / FILES)
    plan.write(study, directory / STUDY)
    annotators.write(directory / ANNOTATORS, NUM_ANNOTATORS)
    return study


class Server:
    """`im3d study serve`, in a process of its own."""

    def __init__(self, directory: Path, url: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "im3d_jax", "study", "serve", str(directory)]
        self._command = [*command, "--database", url, "--port", str(self.port)]

    def start(self) -> float:
        """Returns the seconds until it listens."""
        began = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, env=environment, cwd=ROOT)
        assert self._process.stdout is not None
        if not self._process.stdout.readline().startswith(b"http://"):
            sys.exit("the server has not begun")
        return time.monotonic() - began

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Annotator(threading.Thread):
    """One annotator with a connection, who tries again whatever fails, as the page does."""

    def __init__(self, port: int, name: str, token: str, told: Told) -> None:
        super().__init__(name=name)
        self._home, self._port, self._told = f"/a/{token}", port, told
        self._rng = random.Random(name)
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        try:
            self._annotate()
        except Exception as error:
            with self._told.lock:
                self._told.wrong.append(f"{self.name}: {error!r}")

    def _annotate(self) -> None:
        more = ""
        following = json.loads(self._ask("GET", "/next"))
        while following["state"] != "over":
            if following["state"] != "question":  # a share is done, or others hold what is left
                more = "?more" if following["state"] == "share" else more
                time.sleep(0.2)
                following = json.loads(self._ask("GET", f"/next{more}"))
                continue
            self._ask("GET", f"/{following['left']}", headers={"Range": "bytes=0-4095"})
            item, choice = following["item"], self._rng.choice(["left", "right"])
            answer = json.dumps({"item": item, "choice": choice, "seconds": 1.0})
            began = time.monotonic()
            replied = json.loads(self._ask("POST", f"/answers{more}", answer))
            with self._told.lock:
                self._told.waits_s.append(time.monotonic() - began)
                self._told.kept[self.name, item] = replied["stands"]
            if self._rng.random() < 0.2:
                other = {"left": "right", "right": "left"}[choice]
                again = json.dumps({"item": item, "choice": other, "seconds": 1.0})
                second = json.loads(self._ask("POST", f"/answers{more}", again))
                with self._told.lock:
                    self._told.num_twice += 1
                    if second["stands"] != replied["stands"]:
                        self._told.wrong.append(f"{self.name}, {item}: another choice stands")
                replied = second
            following = replied["next"]

    def _ask(
        self, method: str, path: str, body: str | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        while True:
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
                self._connection.request(method, self._home + path, body, headers or {})
                response = self._connection.getresponse()
                content = response.read()
                if response.status < 400:
                    return content
                if response.status < 500:
                    raise ValueError(f"{path}: {response.status} {content[:100]!r}")
            except (OSError, http.client.HTTPException):
                pass
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            with self._told.lock:
                self._told.num_retries += 1
            time.sleep(self._rng.uniform(0.1, 0.3))


def run(directory: Path, url: str) -> int:
    """Prints what has come of it. Returns 1 if an answer is lost, double or another one."""
    study = make_study(directory)
    server, told = Server(directory, url), Told()
    server.start()
    people = [Annotator(server.port, name, token, told) for token, name in annotators.read(directory).items()]
    began = time.monotonic()
    for each in people:
        each.start()
    starts = []
    for count in KILL_AT:
        while len(told.kept) < count and any(each.is_alive() for each in people):
            time.sleep(0.005)
        server.kill()
        starts.append(server.start())
    for each in people:
        each.join()
    seconds = time.monotonic() - began
    server.kill()
    return report(study, Store(study, url, create=False), told, seconds, starts)


def report(study: plan.Study, store: Store, told: Told, seconds: float, starts: list[float]) -> int:
    answers = store.answers()
    store.close()
    kept = {(answer.annotator, answer.item): answer.choice for answer in answers}
    items = Counter(answer.item for answer in answers if not study.by_id[answer.item].is_check)
    each = Counter(answer.annotator for answer in answers if not study.by_id[answer.item].is_check)
    lost = [key for key, choice in told.kept.items() if kept.get(key) != choice]
    untold = [key for key in kept if key not in told.kept]
    waits_s = sorted(told.waits_s)
    rates = [waits_s[int(share * (len(waits_s) - 1))] for share in (0.5, 0.95, 1)]
    print(f"{items.total()} answers to {len(study.items)} items, {len(answers) - items.total()} to checks")
    print(f"annotators per item: {dict(Counter(items[item.id] for item in study.items))}")
    print(f"items per annotator: from {min(each.values())} to {max(each.values())}")
    print(f"lost or changed: {len(lost)}; double: {len(answers) - len(kept)}; never told: {len(untold)}")
    print(f"sent twice: {told.num_twice}; tried again: {told.num_retries}; wrong: {told.wrong[:3]}")
    print(f"kills: {len(starts)}, listening again after {', '.join(f'{s:.1f}' for s in starts)} s")
    print(f"{seconds:.1f} s, {len(answers) / (seconds - sum(starts)):.0f} answers/s while it served")
    print("wait for an answer in s: median {:.3f}, 95% {:.3f}, longest {:.3f}".format(*rates))
    full = all(items[item.id] == study.answers_per_item for item in study.items)
    return int(bool(lost or untold or told.wrong) or not full or len(kept) != len(answers))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--database", metavar="URL", help="an empty one; by default a file of SQLite")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="study-load-") as directory:
        return run(Path(directory), flags.database or default_url(Path(directory), "answers.sqlite"))


if __name__ == "__main__":
    sys.exit(main())
