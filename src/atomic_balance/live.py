"""The live page, and the stream of numbers that it draws."""

import asyncio
from collections.abc import Sequence
from importlib import resources

from aiohttp import hdrs, web
from msgspec import Struct, json

from atomic_balance.changes import Refusal
from atomic_balance.counting import Numbers
from atomic_balance.handlers import DRAINING, METRICS, PAGE_HEADERS

_PAGE = resources.files("atomic_balance.pages").joinpath("live.html").read_bytes()
_PERIOD_SECONDS = 1.0


class Snapshot(Struct, frozen=True, rename="camel"):
    """What happened in one period: rates per second, latencies in milliseconds; null where nothing happened."""

    applied_per_second: float
    refused_per_second: float
    p50_ms: float | None
    p99_ms: float | None
    changes_per_statement: float | None
    waiting: float


async def page(_: web.Request) -> web.Response:
    """GET /: the live page."""
    return web.Response(body=_PAGE, headers=PAGE_HEADERS)


async def events(request: web.Request) -> web.StreamResponse:
    """GET /live/events: a Snapshot each second, as server-sent events, until the caller goes or the service stops."""
    metrics, draining = request.app[METRICS], request.app[DRAINING]
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store"})
    await response.prepare(request)
    before = metrics.total()
    while not draining.is_set():
        try:
            async with asyncio.timeout(_PERIOD_SECONDS):
                await draining.wait()
        except TimeoutError:
            now = metrics.total()
            await response.write(
                b"data: " + json.encode(_snapshot(now - before, now.gauges["waiting_changes"])) + b"\n\n"
            )
            before = now
    return response


def _snapshot(period: Numbers, waiting: float) -> Snapshot:
    """What to show of a period, from what was counted in it."""
    latencies = period.change_seconds
    statements = sum(period.statement_changes.counts)
    return Snapshot(
        period.outcomes["applied"] / _PERIOD_SECONDS,
        sum(period.outcomes[refusal] for refusal in Refusal) / _PERIOD_SECONDS,
        quantile(0.50, latencies.bounds, latencies.counts),
        quantile(0.99, latencies.bounds, latencies.counts),
        period.statement_changes.sum / statements if statements else None,
        waiting,
    )


def quantile(share: float, bounds: Sequence[float], counts: Sequence[float]) -> float | None:
    """The value, in milliseconds, below which `share` of a distribution lies, evenly spread within each bucket.

    `bounds` are in seconds; what is above the last one counts as that. None if there are no values. As Prometheus's
    histogram_quantile does it.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    lower = 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and wanted <= count:
            return 1000 * (lower + (bound - lower) * wanted / count)
        wanted -= count
        lower = bound
    return 1000 * lower
