"""The server of the page: GET / is the page, POST /generate a stream of characters. It listens on this machine only."""

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from charlm.errors import InputError, Terminated, one_line, printable
from charlm.play.copies import SHORTEST
from charlm.play.generation import LONGEST, LONGEST_PROMPT, Generation, Settings
from charlm.play.guard import CLOSE, NAMES, Guard
from charlm.play.player import Player
from charlm.system import posix

PAGE = Path(__file__).with_name("page.html")
MODELS = "{{models}}"  # where the page has the description of its models
LARGEST_BODY = 8 * LONGEST_PROMPT  # bytes: JSON may take six for a character, and other settings are short
LARGEST_HEAD = 2**16  # bytes of a request before its body
KEEP_ALIVE_SECONDS = 5  # between two requests of a connection
BODY_SECONDS = 10.0  # in which a request must be complete
SEND_SECONDS = 30.0  # after which a visitor who does not read has left
MOST_AT_ONCE = 64  # generations
MOST_CONNECTIONS = 512
MOST_WORKERS = 4  # threads: those of small models mostly wait for each other


class Refused(Exception):
    """A request that gets no stream.

    Args:
        status: the status of HTTP.
        line: what is wrong, and what to do.
    """

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class Generate:
    """POST /generate, as an ASGI application: JSON settings in, server-sent events out.

    Every event is a JSON list of characters, as `generation.characters` describes them; the last one is named `end`, or
    `failed` with one line. The model computes in worker threads, a few milliseconds at a time for each visitor.
    """

    def __init__(self, players: Sequence[Player], most: int = MOST_AT_ONCE):
        self.players, self.most = players, most
        self.at_work = 0  # generations
        self.workers = CapacityLimiter(min(MOST_WORKERS, os.cpu_count() or 1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            generation = self.begin(await body(Request(scope, receive)))
            with self.place_for(generation):
                first = await self.more(generation)  # a mistake in the prompt is found here, before the stream begins
                response = EventSourceResponse(self.events(generation, first), send_timeout=SEND_SECONDS)
                await response(scope, receive, send)
        except InputError as error:
            await PlainTextResponse(f"{printable(str(error))}\n", 400)(scope, receive, send)
        except Refused as refused:
            await PlainTextResponse(f"{refused}\n", refused.status, CLOSE)(scope, receive, send)
        except (ClientDisconnect, SendTimeoutError):
            pass  # nobody reads an answer

    @contextmanager
    def place_for(self, generation: Generation) -> Iterator[None]:
        """Count a generation while its visitor is there, and end it then."""
        if self.at_work >= self.most:
            raise Refused(503, f"{self.most} texts are being generated already: try again in a moment")
        self.at_work += 1
        try:
            yield
        finally:
            generation.leave()
            self.at_work -= 1

    def begin(self, raw: bytes) -> Generation:
        settings = Settings.read(raw)
        if settings.model >= len(self.players):
            raise InputError(f"model={settings.model} is not there: give a number below {len(self.players)}")
        return Generation(self.players[settings.model], settings)

    async def more(self, generation: Generation) -> list[Any]:
        return await to_thread.run_sync(generation.more, limiter=self.workers)

    async def events(self, generation: Generation, first: list[Any]) -> AsyncIterator[ServerSentEvent]:
        found = first
        try:
            while found:
                yield ServerSentEvent(json.dumps(found, separators=(",", ":")))
                found = await self.more(generation)
        except Exception as error:  # of the model, in the middle of a text
            yield ServerSentEvent(json.dumps(printable(one_line(error) or type(error).__name__)), event="failed")
        else:
            yield ServerSentEvent("", event="end")


async def body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        Refused: if it is too large, too slow or not JSON by its name.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the request is not of type application/json: send it as JSON")
    too_large = Refused(413, f"the request has more than {LARGEST_BODY:,} bytes: shorten the prompt")
    if int(request.headers.get("content-length", 0)) > LARGEST_BODY:  # h11 has checked that it is a number
        raise too_large
    held = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                held += chunk
                if len(held) > LARGEST_BODY:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the request was not complete after {BODY_SECONDS:g} seconds: send it again") from None
    return bytes(held)


def page(players: Sequence[Player]) -> HTMLResponse:
    """Return the page, with a policy that allows its own style and script and no other, and requests only to here."""
    text = PAGE.read_text(encoding="utf-8")
    hashes = {
        tag: base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        for tag, content in re.findall(r"<(style|script)>(.*?)</\1>", text, re.S)
    }
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    described = {
        "models": [player.card() for player in players],
        "shortest": SHORTEST,
        "longest": LONGEST,
        "longest_prompt": LONGEST_PROMPT,
    }
    content = text.replace(MODELS, json.dumps(described).replace("<", "\\u003c"))
    return HTMLResponse(content, headers={"content-security-policy": policy})


def application(players: Sequence[Player], port: int, most: int = MOST_AT_ONCE) -> ASGIApp:
    """Return the page and its generator as an ASGI application.

    Args:
        port: that it is served on, which is part of its address.
        most: generations at once.
    """
    shown = page(players)

    async def show(request: Request) -> HTMLResponse:
        return shown

    async def refuse(request: Request, error: Exception) -> PlainTextResponse:
        assert isinstance(error, HTTPException)
        lines = {404: "there is nothing here: the page is /", 405: "this address takes another method"}
        return PlainTextResponse(f"{lines.get(error.status_code, error.detail)}\n", error.status_code, error.headers)

    routes = [
        Route("/", show, methods=["GET"]),
        Route("/generate", Generate(players, most), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse})
    app.router.redirect_slashes = False
    return Guard(app, port)


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine only.

    Args:
        port: 0 for a free one.

    Raises:
        InputError: if the port is in use or not allowed.
    """
    try:
        return socket.create_server((NAMES[0], port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(
            f"--port {port} cannot be used ({reason}): choose another one, or --port 0 for one that is free"
        ) from None


def address_of(listener: socket.socket) -> str:
    """Return the address of the page."""
    return f"http://{NAMES[0]}:{listener.getsockname()[1]}/"


def server(app: ASGIApp) -> uvicorn.Server:
    """Return a server for the application, without logs: every refusal is in its answer."""
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="critical",
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=LARGEST_HEAD,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def serve(players: Sequence[Player], listener: socket.socket) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        Terminated: on SIGTERM or SIGHUP.
    """
    running = server(application(players, listener.getsockname()[1]))
    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        running.should_exit = True

    for number in posix.signals("SIGHUP"):  # uvicorn has handlers for the others
        signal.signal(number, leave)
    with suppress(KeyboardInterrupt):  # the usual end
        running.run(sockets=[listener])
    if received:
        raise Terminated(signal.Signals(received[0]))
