"""What is measured once, and is no load: very many requests that wait, and a reader of the feed."""

import http.client
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from statistics import median

import psutil
import psycopg

from benchmarking.contenders import BenchmarkError, Stage, service
from benchmarking.generators import run_wrk
from benchmarking.loads import LOADS, SERVICE
from benchmarking.results import FOLLOWING, WAITING, Figures, Key
from benchmarking.rounds import check_answers, journal_rows_of, metric_of

_POLL_SECONDS = 0.1
_WAITING_SECONDS = 10  # of wrk, in which all of them must have connected
_SPARE_DESCRIPTORS = 200
_FOLLOWING_SECONDS = 10
_READER_WAITS_SECONDS = 2


def wait(stage: Stage) -> Figures:
    """Let very many requests wait for a row that another transaction holds, then let it go. Raises BenchmarkError."""
    count = min(WAITING[1], resource.getrlimit(resource.RLIMIT_NOFILE)[1] - _SPARE_DESCRIPTORS)
    load = LOADS["hot"]
    print(f"{count:,} requests that wait", file=sys.stderr, flush=True)
    running = service(load, stage)
    memory = psutil.Process(running.pids[0]).memory_info
    before = memory().rss
    with ThreadPoolExecutor() as threads, psycopg.connect(running.journal_url) as holder:
        holder.execute("SELECT FROM users WHERE id = 1 FOR UPDATE")
        counting = threads.submit(run_wrk, load, running.ports, count, _WAITING_SECONDS)
        while metric_of(running, "atomic_balance_waiting_changes") < count:
            if counting.done():
                raise BenchmarkError(f"{count} requests were to wait at once, and never did: {counting.result()}")
            time.sleep(_POLL_SECONDS)
        waiting = memory().rss
        holder.rollback()
        counted = counting.result()
    check_answers(SERVICE, load, count, counted, journal_rows_of(running))
    return {"requests": count, "before_mb": before / 1e6, "waiting_mb": waiting / 1e6}


def follow(stage: Stage) -> Figures:
    """Let one reader follow the feed while changes are made, then read all of it once more. Raises BenchmarkError."""
    load, connections = LOADS["rows"], FOLLOWING[1]
    print("a reader of the feed", file=sys.stderr, flush=True)
    running = service(load, stage)
    with ThreadPoolExecutor() as threads:
        counting = threads.submit(run_wrk, load, running.ports, connections, _FOLLOWING_SECONDS)
        followed, behind_ms, _ = _read(running.ports[0], _READER_WAITS_SECONDS, counting.done)
        counted = counting.result()
    rows = journal_rows_of(running)
    check_answers(SERVICE, load, connections, counted, rows)
    began = time.perf_counter()
    backlog, _, pages = _read(running.ports[0], 0, lambda: True)
    seconds = time.perf_counter() - began
    if not followed == backlog == rows:
        raise BenchmarkError(f"{rows} changes; a reader got {followed} while they came, and {backlog} afterwards")
    return {
        "rate": counted.answers / counted.seconds,
        "behind_p50_ms": median(behind_ms),
        "behind_max_ms": max(behind_ms),
        "read": followed,
        "pages": pages,
        "backlog_rate": backlog / seconds,
    }


def _read(port: str, wait_seconds: int, is_over: Callable[[], bool]) -> tuple[int, list[float], int]:
    """Read the feed from its beginning until it `is_over` and a page is empty.

    Gives how many changes there were, how old the newest of each page was when it had come, in ms, and the pages.
    """
    connection = http.client.HTTPConnection("127.0.0.1", int(port))
    count, pages, after, ages_ms = 0, 0, "", list[float]()
    while True:
        over = is_over()
        connection.request("GET", f"/api/changes?wait={wait_seconds}{after}")
        page = json.loads(connection.getresponse().read())
        changes = page["changes"]
        if not changes and over:
            connection.close()
            return count, ages_ms, pages
        count, pages, after = count + len(changes), pages + 1, f"&after={page['next']}"
        if changes:
            newest = datetime.fromisoformat(changes[-1]["createdAt"])
            ages_ms.append((datetime.now(UTC) - newest).total_seconds() * 1e3)


SCENARIOS: Mapping[Key, Callable[[Stage], Figures]] = {WAITING: wait, FOLLOWING: follow}
"""Each, by what its figures are filed under."""
