"""What annotators' browsers are told, and what they may ask for."""

import re

import pytest
from starlette.testclient import TestClient

from im3d_jax.study import FILES, annotators, plan, server
from im3d_jax.study.store import Store
from tests.im3d_jax.study.conftest import HOSTILE, made_up


@pytest.fixture
def client(directory, tmp_path):
    """A client, and the tokens of its study."""
    study = plan.read(directory)
    store = Store(study, f"sqlite:///{tmp_path}/answers.sqlite")
    names = annotators.read(directory)
    app = server.application(study, directory, store, names, is_local=True)
    with TestClient(app, base_url="http://127.0.0.1:8080") as made:
        made.tokens, made.study, made.store = list(names), study, store
        yield made
    store.close()


def test_an_annotator_answers_to_the_end(client):
    home = f"/a/{client.tokens[0]}"
    told, seen = client.get(f"{home}/next").json(), []
    while told["state"] == "question":
        assert told["answered"] == len(seen) < told["share"]
        assert client.get(f"{home}/next").json() == told, "a reload changes nothing"
        seen.append(told["item"])
        answer = {"item": told["item"], "choice": "right", "seconds": 2.5}
        first, again = [client.post(f"{home}/answers", json=answer).json() for _ in range(2)]
        assert first == again, "nor does a double click"
        told = first["next"]
    assert told["state"] == "share"
    kept = client.store.answers()
    assert [(each.item, each.choice, each.seconds) for each in kept] == [
        (name, "right", 2.5) for name in seen
    ]
    assert {each.annotator for each in kept} == {"a01"}


def test_what_is_told_does_not_show_methods_or_checks(client):
    for token in client.tokens:
        told = client.get(f"/a/{token}/next").json()
        assert set(told) == {
            *("state", "answered", "share", "item", "kind", "question", "hint", "prompt"),
            *("picture", "left", "right"),
        }
        assert all(re.fullmatch("files/[0-9a-f]{16}.mp4", told[side]) for side in ("left", "right"))


def test_hostile_prompts_travel_as_json_alone(client):
    response = client.get(f"/a/{client.tokens[0]}/next")
    prompts = {client.study.prompts[item.prompt].text for item in client.study.items}
    assert HOSTILE in prompts and response.json()["prompt"] in prompts
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    page = client.get(f"/a/{client.tokens[0]}/")
    assert page.status_code == 200 and "alert(1)" not in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", ""), "the page asks nobody else"


def test_videos_come_in_ranges(client, directory):
    home = f"/a/{client.tokens[0]}"
    told = client.get(f"{home}/next").json()
    content = (directory / FILES / told["left"].rpartition("/")[2]).read_bytes()
    whole = client.get(f"{home}/{told['left']}")
    assert whole.content == content and whole.headers["content-type"] == "video/mp4"
    part = client.get(f"{home}/{told['left']}", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == content[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"


def test_a_video_that_is_gone_is_said_once_and_may_come_back(client, directory, capsys):
    home, path = f"/a/{client.tokens[0]}", directory / FILES / next(iter(client.study.videos.values())).file
    path.rename(path.with_suffix(".away"))
    try:
        assert [client.get(f"{home}/files/{path.name}").status_code for _ in range(3)] == [503] * 3
    finally:
        path.with_suffix(".away").rename(path)
    assert capsys.readouterr().err.count(f"{path} is not there any more") == 1
    assert client.get(f"{home}/files/{path.name}").status_code == 200


@pytest.mark.parametrize("name", ["../study.json", "..%2Fannotators.csv", "study.json", "%2Fetc%2Fpasswd"])
def test_no_other_file_is_served(client, name):
    assert client.get(f"/a/{client.tokens[0]}/files/{name}").status_code == 404


def test_a_wrong_token_gets_nothing(client):
    name = next(iter(client.study.files))
    for path in ("", "next", f"files/{name}"):
        assert client.get(f"/a/wrong-token-of-somebody/{path}").status_code == 404
    assert "code or link is not valid" in client.get("/a/").text
    refused = client.get("/a/<b>wrong/")
    assert refused.status_code == 404 and "<b>" not in refused.text
    answer = {"item": client.study.items[0].id, "choice": "left"}
    assert client.post("/a/wrong-token-of-somebody/answers", json=answer).status_code == 404


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 400),
        (b"[]", 400),
        (b'{"item": 3, "choice": "left"}', 400),
        (b'{"item": "q00001", "choice": "both"}', 400),
        (b'{"item": "q99999", "choice": "left"}', 400),
        (b"[" * 3000, 400),
        (b'"' + b"x" * 5000, 413),
    ],
)
def test_what_is_no_answer_is_refused(client, body, status):
    response = client.post(f"/a/{client.tokens[0]}/answers", content=body)
    assert response.status_code == status and "error" in response.json()
    assert client.store.answers() == []


@pytest.mark.parametrize("seconds", ["NaN", "-1", "1e999", '"3"', "true", "null"])
def test_a_time_that_makes_no_sense_is_left_out(client, seconds):
    item = client.get(f"/a/{client.tokens[0]}/next").json()["item"]
    body = f'{{"item": "{item}", "choice": "left", "seconds": {seconds}}}'
    assert client.post(f"/a/{client.tokens[0]}/answers", content=body.encode()).status_code == 200
    assert [each.seconds for each in client.store.answers()] == [None]


@pytest.mark.parametrize("host, status", [("evil.example", 403), ("localhost:1", 200), ("[::1]:80", 200)])
def test_a_local_server_answers_to_local_names_alone(client, host, status):
    assert client.get("/", headers={"Host": host}).status_code == status


def test_a_database_that_fails_is_said_and_the_answer_can_be_sent_again(client, capsys, monkeypatch):
    from sqlalchemy.exc import OperationalError

    def fail(*_):
        raise OperationalError("SELECT", {}, Exception("gone"))

    home = f"/a/{client.tokens[0]}"
    item = client.get(f"{home}/next").json()["item"]
    with monkeypatch.context() as patch:
        patch.setattr(client.store, "record", fail)
        for _ in range(3):
            assert client.post(f"{home}/answers", json={"item": item, "choice": "left"}).status_code == 503
    assert capsys.readouterr().err.count("the database fails") == 1, "pages ask again every few seconds"
    assert client.post(f"{home}/answers", json={"item": item, "choice": "left"}).status_code == 200


def test_annotators_csv_is_private_and_its_mistakes_are_named(directory, tmp_path, user_error):
    assert (directory / "annotators.csv").stat().st_mode & 0o077 == 0
    path = tmp_path / "annotators.csv"
    for text, message in (
        ("name,token\n", "line 1: is not annotator,token"),
        ("annotator,token\na,short\n", "line 2: a token has 12 to 100"),
        ("annotator,token\na,abcdefghijkl\n\nb,abcdefghijkl\n", "line 4: .* stands there twice"),
        ("annotator,token\n", "has no annotators"),
    ):
        path.write_text(text)
        with user_error(message):
            annotators.read(tmp_path)


def test_a_port_that_is_taken_is_one_line(user_error):
    with server.listen("127.0.0.1", 0) as taken, user_error("cannot listen on 127.0.0.1:.*--port"):
        server.listen("127.0.0.1", taken.getsockname()[1])
    with user_error("cannot listen on no.such.host.invalid"):
        server.listen("no.such.host.invalid", 0)


def test_a_study_without_pictures_asks_for_the_description():
    study = made_up()
    assert study.asked(study.items[0]) == "Which video fits the description better?"
