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
    return resources.files(__name__).joinpath(f"{name}.html").read_bytes()


_TOKEN = _read("token")  # the field for a token, which both pages have
DOCS = _read("docs").replace(b"<!-- token -->\n", _TOKEN)
LIVE = _read("live").replace(b"<!-- token -->\n", _TOKEN)
LIVE_WITHOUT_RACES = LIVE.replace(b"<body>", b'<body class="without-races">')


def page_response(page: bytes) -> web.Response:
    """The answer with a `page`, one of the above, which may load nothing but what this service answers."""
    return web.Response(body=page, headers=_HEADERS)
