"""Refuses requests that do not come from the page itself, such as those of another site that a visitor has open.

A browser sends the name in the address as Host, which shows that a stranger's name leads to this machine (DNS
rebinding). It names the site that a request comes from in Origin and Sec-Fetch-Site.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from charlm.errors import one_line, warn

NAMES = ("127.0.0.1", "localhost", "[::1]")  # of this machine
# Of every answer. The policy of the page, which depends on its content, is the page's own.
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

CLOSE = {"connection": "close"}  # of answers to requests whose body is not read


class Guard:
    """ASGI middleware: refuses requests from elsewhere, and answers errors in one line.

    Args:
        app: what it guards.
        port: that the server listens on.
    """

    def __init__(self, app: ASGIApp, port: int):
        self.app, self.port = app, port
        self.hosts = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        reason = self.refusal(Headers(scope=scope), scope["method"])
        app = PlainTextResponse(f"{reason}\n", 403, CLOSE) if reason else self.app
        try:
            await app(scope, receive, send_with_headers)
        except Exception as error:  # one request must not end the others
            warn(f"a request failed: {type(error).__name__}: {one_line(error)}")
            if not begun:
                failed = PlainTextResponse("the request failed: see the terminal\n", 500, CLOSE)
                await failed(scope, receive, send_with_headers)

    def refusal(self, headers: Headers, method: str) -> str | None:
        """Return why a request is refused; None if it is not."""
        hosts, origins, sites = (headers.getlist(name) for name in ("host", "origin", "sec-fetch-site"))
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return f"refused: this page has the address http://{NAMES[0]}:{self.port}/ and no other name"
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return "refused: the request comes from the page of another site"
        # A link elsewhere may lead to the page, which costs nothing.
        is_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        if any(site not in ("same-origin", "none") for site in sites) and not is_link:
            return "refused: the request comes from the page of another site"
        return None
