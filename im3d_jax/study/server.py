"""The web page of a study: one question at a time, for each annotator behind a secret address.

    /                       asks for a token
    /a/TOKEN/               the page
    /a/TOKEN/next           what to ask, as JSON
    /a/TOKEN/answers        takes an answer, and says what to ask next
    /a/TOKEN/files/NAME     the videos and pictures, in ranges as browsers ask for them

The page makes no request to any other host. Texts of users reach it as JSON and become text, never HTML.
"""

from __future__ import annotations

import ipaddress
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from html import escape
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from im3d_jax.study import FILES
from im3d_jax.study.assignment import share
from im3d_jax.study.plan import Study
from im3d_jax.study.store import Answer, Next, Store
from recon_torch.errors import UserError, first_line

HERE = Path(__file__).parent / "page"
ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "start.js": "text/javascript"}
LARGEST_BODY = 4096
LONGEST_S = 86_400.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # addresses hold tokens
    "X-Content-Type-Options": "nosniff",
}
QUIET_S = 10.0
UNKNOWN = "This code or link is not valid. Please copy the whole of what you were sent."
Handler = Callable[[Request], Awaitable[Response]]


class Pages:
    """The handlers of a study's addresses."""

    def __init__(self, study: Study, directory: Path, store: Store, annotators: dict[str, str]) -> None:
        """annotators: names by their tokens."""
        self._study, self._store, self._annotators = study, store, annotators
        self._folder = directory / FILES
        self._warn = Warnings()

    def routes(self) -> list[Route]:
        return [
            Route("/", _resource("start.html")),
            *(Route(f"/static/{name}", _resource(name)) for name in ASSETS),
            Route("/a/{token}/", self.page),
            Route("/a/{token}/next", self.next),
            Route("/a/{token}/answers", self.answer, methods=["POST"]),
            Route("/a/{token}/files/{name}", self.file),
        ]

    def _annotator(self, request: Request) -> str:
        name = self._annotators.get(request.path_params["token"])
        if name is None:
            raise HTTPException(404, UNKNOWN)
        return name

    async def page(self, request: Request) -> Response:
        self._annotator(request)
        return _plain_file("page.html", "text/html")

    async def next(self, request: Request) -> Response:
        annotator = self._annotator(request)
        following = await run_in_threadpool(self._store.next, annotator, _wants_more(request))
        return JSONResponse(self._told(annotator, following))

    async def answer(self, request: Request) -> Response:
        annotator = self._annotator(request)
        answer = _read_answer(annotator, await _body(request))
        try:
            stands, following = await run_in_threadpool(self._store.record, answer, _wants_more(request))
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        return JSONResponse({"stands": stands, "next": self._told(annotator, following)})

    async def file(self, request: Request) -> Response:
        self._annotator(request)
        name = request.path_params["name"]
        if name not in self._study.files:  # so that no address can name another file
            raise HTTPException(404, "There is no such file.")
        if not (self._folder / name).is_file():
            self._warn(f"{self._folder / name} is not there any more; copy it back")
            raise HTTPException(503, "The file is not there at the moment.")
        kind = "video/mp4" if name.endswith(".mp4") else "image/png"
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(self._folder / name, media_type=kind, headers=headers)

    async def database_failed(self, _: Request, error: Exception) -> Response:
        """The page keeps the answer and sends it again."""
        self._warn(f"the database fails: {first_line(error, 200)}")
        return JSONResponse({"error": "The answers cannot be kept at the moment."}, 503)

    def _told(self, annotator: str, following: Next) -> dict[str, Any]:
        """What the page is told. Nothing in it says which method made a video, or whether it is a check."""
        item, study = following.item, self._study
        told: dict[str, Any] = {
            "state": following.state,
            "answered": following.num_answered,
            "share": share(study, annotator),
        }
        if item is None:
            return told
        prompt = study.prompts[item.prompt]
        return told | {
            "item": item.id,
            "kind": item.question,
            "question": study.asked(item),
            "hint": study.questions[item.question].hint,
            "prompt": prompt.text,
            "picture": prompt.picture and f"files/{prompt.picture}",
            "left": f"files/{study.videos[item.left].file}",
            "right": f"files/{study.videos[item.right].file}",
        }


def _wants_more(request: Request) -> bool:
    return "more" in request.query_params


async def _body(request: Request) -> bytes:
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            raise HTTPException(413, "The answer is too long.")
    return content


def _read_answer(annotator: str, body: bytes) -> Answer:
    """Raises HTTPException for what is no answer. A time that makes no sense is left out."""
    try:
        told = json.loads(body)
        item, choice, seconds = told["item"], told["choice"], told.get("seconds")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise HTTPException(400, "This is no answer.") from None
    if not isinstance(item, str) or not isinstance(choice, str):
        raise HTTPException(400, "This is no answer.")
    is_number = type(seconds) in (int, float) and 0 <= seconds <= LONGEST_S  # which NaN is not
    return Answer(annotator, item, choice, float(seconds) if is_number else None)


def _resource(name: str) -> Handler:
    async def respond(_: Request) -> Response:
        return _plain_file(name, ASSETS.get(name, "text/html"))

    return respond


def _plain_file(name: str, kind: str, status: int = 200) -> Response:
    headers = {"Cache-Control": "no-cache"}
    return Response((HERE / name).read_bytes(), status, headers, f"{kind}; charset=utf-8")


# ---- The application ----


def application(
    study: Study, directory: Path, store: Store, annotators: dict[str, str], is_local: bool
) -> Any:
    """The ASGI application.

    is_local: whether it answers to names of this machine alone, so that no page of another host reaches it.
    """
    pages = Pages(study, directory, store, annotators)
    handlers: dict[Any, Any] = {HTTPException: _refuse, SQLAlchemyError: pages.database_failed}
    app = Starlette(routes=pages.routes(), exception_handlers=handlers)

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), text.encode()) for name, text in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if scope["type"] == "http" and is_local and not is_loopback(_host(scope)):
            refusal = PlainTextResponse("This server is for the machine it runs on.", 403)
            return await refusal(scope, receive, send_with_headers)
        await app(scope, receive, send_with_headers)

    return guarded


def _host(scope: Any) -> str:
    """The name by which the server was called, without its port."""
    found = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    if found.startswith("["):
        return found[1:].partition("]")[0]
    return found.partition(":")[0]


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.method == "GET" and not request.url.path.endswith("/next"):
        text = (HERE / "refused.html").read_text(encoding="utf-8")
        reason = UNKNOWN if error.detail == "Not Found" else error.detail  # which Starlette says of itself
        return HTMLResponse(text.replace("REASON", escape(reason)), error.status_code)
    return JSONResponse({"error": error.detail}, error.status_code)


class Warnings:
    """Lines on stderr of which there is one in QUIET_S at most: pages ask again and again for what fails."""

    def __init__(self) -> None:
        self._said_at = -math.inf

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._said_at >= QUIET_S:
            self._said_at = time.monotonic()
            print(f"im3d: warning: {text}", file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family[0], socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(family[4])
        listening.listen(256)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {first_line(error)}; give --host and --port"
        ) from None
    return listening


def run(app: Any, listening: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, which end the process once requests under way are answered."""
    # uvicorn raises the signal again when it has ended, which would leave no time to close anything.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # No log of addresses, which hold tokens.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])
