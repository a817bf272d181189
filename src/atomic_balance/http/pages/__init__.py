"""The pages that a browser gets, whole: no build step, and nothing from another host."""

from importlib import resources

from aiohttp import hdrs, web

_HEADERS = {
    hdrs.CONTENT_TYPE: "text/html; charset=utf-8",
    "Content-Security-Policy": (
        "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _read(name: str) -> bytes:
    folder = resources.files(__name__)
    page = folder.joinpath(f"{name}.html").read_bytes()
    return page.replace(b"/* token.js */\n", folder.joinpath("token.js").read_bytes())


DOCS = _read("docs")
LIVE = _read("live")
LIVE_WITHOUT_RACES = LIVE.replace(b"<body>", b'<body class="without-races">')


def page_response(page: bytes) -> web.Response:
    """The answer with a `page`, one of the above, which may load nothing but what this service answers."""
    return web.Response(body=page, headers=_HEADERS)
