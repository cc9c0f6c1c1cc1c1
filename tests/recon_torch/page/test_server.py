"""Pages are served by their names alone, and to this machine alone."""

import http.client
import shutil
import threading

import pytest

from recon_torch.page import server


@pytest.fixture
def answers(asset):
    """A function from a path and a Host to the status and the text, of a server of two assets."""
    shutil.copytree(asset, asset.parent / "more" / "a b<i>")
    listening = server.serve(server.pages_of(asset.parent), "127.0.0.1", 0)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()

    def ask(path: str, host: str = "localhost") -> tuple[int, str]:
        connection = http.client.HTTPConnection(*listening.server_address, timeout=20)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    yield ask
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_assets_are_listed_and_shown(answers):
    status, page = answers("/")
    assert status == 200 and 'href="/more/a%20b%3Ci%3E"' in page and "<i>" not in page
    assert '<link rel="icon" href="data:,">' in page  # else browsers ask for one, and their console says so
    for name in ("/asset", "/more/a%20b%3Ci%3E"):
        status, page = answers(name)
        assert (
            status == 200
            and "var asset" not in page
            and '<script type="application/json" id="asset">' in page
        )


@pytest.mark.parametrize("path", ["/asset/report.json", "/../asset", "/more", "/etc/passwd", "/%2e%2e/asset"])
def test_nothing_else_is_served(answers, path):
    assert answers(path)[0] == 404


def test_other_names_of_this_machine_are_refused(answers):
    """A page from elsewhere whose name is made to point here could read the assets otherwise."""
    assert answers("/", "evil.example:80")[0] == 403
    assert answers("/", "127.0.0.1:8080")[0] == answers("/", "[::1]:80")[0] == 200


def test_an_asset_that_is_gone_is_an_error_of_one_line(answers, asset):
    (asset / "asset.ply").write_bytes(b"no ply")
    status, page = answers("/asset")
    assert status == 500 and "asset.ply" in page and "Traceback" not in page


def test_one_asset_below_a_directory_is_shown_at_once(asset):
    assert list(server.pages_of(asset.parent)) == ["/"]


@pytest.mark.parametrize("source", ["nothing", "empty"])
def test_directories_without_assets_are_refused(tmp_path, source, user_error):
    (tmp_path / "empty").mkdir()
    with user_error("does not exist|has no asset.ply"):
        server.pages_of(tmp_path / source)


def test_a_port_that_is_taken_is_named(asset, user_error):
    pages = server.pages_of(asset)
    with (
        server.serve(pages, "127.0.0.1", 0) as first,
        user_error("cannot listen on 127.0.0.1:.* give --host"),
    ):
        server.serve(pages, "127.0.0.1", first.server_address[1])
