"""The live page, and the stream of numbers that it draws."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from aiohttp import hdrs, web
from msgspec import Struct, json

from atomic_balance.changes import Refusal
from atomic_balance.http.app_keys import ACCOUNTS, DRAINING, METRICS, OFFERS_RACES
from atomic_balance.http.errors import ApiError
from atomic_balance.http.handlers import answer_with
from atomic_balance.http.messages import RingQuery, RingTotal
from atomic_balance.http.pages import LIVE, LIVE_WITHOUT_RACES, page_response
from atomic_balance.http.parsing import parse_query
from atomic_balance.observe.counting import Numbers
from atomic_balance.observe.metrics import Metrics

log = logging.getLogger("atomic_balance")

PUBLISHER: "web.AppKey[Publisher]" = web.AppKey("publisher")
FOLLOWERS_MAX = 1_000
RING_ACCOUNTS = 100

_PERIOD_SECONDS = 1.0


class Snapshot(Struct, frozen=True, rename="camel"):
    """What happened in one period: rates per second, latencies in milliseconds; null where nothing happened."""

    applied_per_second: float
    refused_per_second: float
    p50_ms: float | None
    p99_ms: float | None
    changes_per_statement: float | None
    waiting: float


async def page(request: web.Request) -> web.Response:
    """GET /: the live page, without its races where they are not offered."""
    return page_response(LIVE if request.app[OFFERS_RACES] else LIVE_WITHOUT_RACES)


async def ring_total(request: web.Request) -> web.Response:
    """GET /live/total: what the accounts of the page's ring have together, while money goes round."""
    if not request.app[OFFERS_RACES]:
        raise ApiError("not_found")
    first = parse_query(RingQuery, request).first
    return answer_with(RingTotal(await request.app[ACCOUNTS].total(first, first + RING_ACCOUNTS - 1)))


class Publisher:
    """Makes and encodes one Snapshot each second for all followers; `followers`: how many there are."""

    def __init__(self) -> None:
        self.followers = 0
        self._event = b""
        self._tick = asyncio.Event()

    async def publish(self, metrics: Metrics, draining: asyncio.Event) -> None:
        """Publish until `draining` is set."""
        before = metrics.total()
        while not draining.is_set():
            try:
                async with asyncio.timeout(_PERIOD_SECONDS):
                    await draining.wait()
            except TimeoutError:
                now = metrics.total()
                snapshot = _snapshot(now - before, now.gauges["waiting_changes"])
                self._event = b"data: " + json.encode(snapshot) + b"\n\n"
                before = now
                self._tick.set()
                self._tick = asyncio.Event()
        self._event = b""
        self._tick.set()

    async def event(self) -> bytes:
        """Wait for the next Snapshot and give it as a server-sent event; empty when there are no more."""
        await self._tick.wait()
        return self._event


async def publishing(app: web.Application) -> AsyncIterator[None]:
    """A cleanup context: publish while the application runs."""
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(app[PUBLISHER].publish(app[METRICS], app[DRAINING]))
        yield
        task.cancel()


async def events(request: web.Request) -> web.StreamResponse:
    """GET /live/events: a Snapshot each second, as server-sent events, until the caller goes or the service stops."""
    publisher = request.app[PUBLISHER]
    response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store"})
    if request.method == hdrs.METH_HEAD:
        return response
    if publisher.followers >= FOLLOWERS_MAX:
        raise ApiError("unavailable")
    publisher.followers += 1
    try:
        await response.prepare(request)
        while event := await publisher.event():
            await response.write(event)
    except ConnectionError:
        log.debug("a follower of the live stream has gone")
    finally:
        publisher.followers -= 1
    return response


def _snapshot(period: Numbers, waiting: float) -> Snapshot:
    """The Snapshot of a period in which `period` was counted."""
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
