"""The live page, and the stream of numbers that it draws."""

import asyncio
from collections.abc import Sequence
from importlib import resources

from aiohttp import hdrs, web
from msgspec import Struct, json

from atomic_balance.handlers import DRAINING, METRICS, PAGE_HEADERS
from atomic_balance.metrics import Metrics

_PAGE = resources.files("atomic_balance.pages").joinpath("live.html").read_bytes()
_PERIOD_SECONDS = 1.0
_REFUSALS = ("insufficient_funds", "balance_limit_exceeded")


class Snapshot(Struct, frozen=True, rename="camel"):
    """What happened in one period: rates per second, latencies in milliseconds; null where nothing happened."""

    applied_per_second: float
    refused_per_second: float
    p50_ms: float | None
    p99_ms: float | None
    changes_per_statement: float | None
    waiting: float


class _Totals(Struct, frozen=True):
    applied: int
    refused: int
    latencies: list[int]
    statements: int
    statement_changes: float

    @classmethod
    def of(cls, metrics: Metrics) -> "_Totals":
        return cls(
            metrics.outcomes["applied"],
            sum(metrics.outcomes[refusal] for refusal in _REFUSALS),
            list(metrics.change_seconds.counts),
            sum(metrics.statement_changes.counts),
            metrics.statement_changes.sum,
        )


async def page(_: web.Request) -> web.Response:
    """GET /: the live page."""
    return web.Response(body=_PAGE, headers=PAGE_HEADERS)


async def events(request: web.Request) -> web.StreamResponse:
    """GET /live/events: a Snapshot each second, as server-sent events, until the caller goes or the service stops."""
    metrics, draining = request.app[METRICS], request.app[DRAINING]
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store"})
    await response.prepare(request)
    before = _Totals.of(metrics)
    while not draining.is_set():
        try:
            async with asyncio.timeout(_PERIOD_SECONDS):
                await draining.wait()
        except TimeoutError:
            now = _Totals.of(metrics)
            await response.write(b"data: " + json.encode(_between(before, now, metrics)) + b"\n\n")
            before = now
    return response


def _between(before: _Totals, now: _Totals, metrics: Metrics) -> Snapshot:
    latencies = [later - earlier for earlier, later in zip(before.latencies, now.latencies, strict=True)]
    statements = now.statements - before.statements
    bounds = metrics.change_seconds.bounds
    return Snapshot(
        (now.applied - before.applied) / _PERIOD_SECONDS,
        (now.refused - before.refused) / _PERIOD_SECONDS,
        quantile(0.50, bounds, latencies),
        quantile(0.99, bounds, latencies),
        (now.statement_changes - before.statement_changes) / statements if statements else None,
        metrics.gauges["waiting_changes"][1](),
    )


def quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
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
