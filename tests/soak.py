"""The soak test: mixed load and random faults for a while, then every answer is held against the journal.

Each request bears a reference of its own, so that each row of the journal can be traced to the one that caused it.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psycopg
from psycopg.conninfo import conninfo_to_dict

from atomic_balance.changes import BALANCE_LIMIT
from atomic_balance.postgres.verify import verify
from tests.fault_proxy import FaultProxy
from tests.killable import KillableServer, killable_server
from tests.processes import Service, running_service
from tests.soak_transfers import BUSY, TransferAsked, TransferLoad, transfers_against_the_journal

WORKERS = 40
HOT_USER = 1
USERS = range(1, 60)
OPENING = 1_000
FULL_USER = 60
"""A user with room for little more."""
CALM_SECONDS = (0.3, 2.0)
"""The shortest and the longest time between two faults."""
PATIENCE_SECONDS = 120
"""The longest that a service may take to start or to end, however slow the machine."""
SETTINGS = {"DEADLINE_SECONDS": "3", "STATEMENT_SECONDS": "1", "CONNECT_SECONDS": "5"}


class Answer(NamedTuple):
    """One answer to a request; status 0: none came."""

    status: int
    new_balance: int | None
    replayed: bool


class Asked(NamedTuple):
    """A change that was asked for, once or with its key several times, and the answers."""

    user_id: int
    amount: int
    key: str | None
    reference: str
    answers: list[Answer]


class HoldAsked(NamedTuple):
    """A hold that was asked for, then to be ended in one way or another, or left to expire; and the answers.

    `placings`: the statuses. `endings`: capture or release, the status, and what was said to have become of the hold.
    """

    user_id: int
    amount: int
    hold_id: str
    placings: list[int]
    endings: list[tuple[str, int, str | None, int | None]]


class Row(NamedTuple):
    """A row of the journal."""

    version: int | None
    amount: int
    balance: int
    key: str


class HoldRow(NamedTuple):
    """What the journal has of a hold; `end` None if it was refused."""

    amount: int
    refused: bool
    end: str | None
    captured: int | None


class Services:
    """Two services behind one faulty network, to be killed and restarted where they were."""

    def __init__(self, environment: dict[str, str], directory: Path) -> None:
        self._environment = environment
        self._directory = directory
        self._stacks = [contextlib.AsyncExitStack(), contextlib.AsyncExitStack()]
        self._running: list[Service] = []

    async def start(self) -> None:
        for stack in self._stacks:
            self._running.append(await self._started(stack, self._environment))
        self.urls = [service.url for service in self._running]

    async def restart(self, index: int, how: signal.Signals) -> None:
        """End one of them by a signal, and start it again on its port."""
        service = self._running[index]
        service.process.send_signal(how)
        async with asyncio.timeout(PATIENCE_SECONDS):
            status = await service.process.wait()
        assert status == (0 if how is signal.SIGTERM else -how), f"the service ended with {status}: {service.log[-5:]}"
        await self._stacks[index].aclose()
        environment = {**self._environment, "PORT": self.urls[index].rsplit(":", 1)[1]}
        self._running[index] = await self._started(self._stacks[index], environment)

    async def _started(self, stack: contextlib.AsyncExitStack, environment: dict[str, str]) -> Service:
        """Start one, and again if its database did not answer in time, as whoever runs a service does."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    return await stack.enter_async_context(running_service(environment, self._directory))
                except ExceptionGroup as error:
                    if "the service did not start: atomic-balance: database: " not in str(error.exceptions):
                        raise

    async def stop(self) -> None:
        for stack in self._stacks:
            await stack.aclose()


class Load:
    """Clients that ask for changes, one after the other, and note what they are told."""

    def __init__(self, urls: list[str], chance: random.Random) -> None:
        self.asked: list[Asked] = []
        self.holds: list[HoldAsked] = []
        self.opened: set[int] = set()
        self.transfers = TransferLoad(urls, random.Random(chance.random()), self.opened, USERS)
        self._urls = urls
        self._chance = chance

    async def work(self, client: aiohttp.ClientSession, until: float) -> None:
        """Ask until the time is over."""
        while time.monotonic() < until:
            kind = self._chance.random()
            if kind < 0.08:
                await self._bulk(client)
            elif kind < 0.12:
                await self._open(client)
            elif kind < 0.32:
                await self._hold(client)
            elif kind < 0.38:
                await self.transfers.bulk(client)
            elif kind < 0.62:
                await self.transfers.one(client)
            else:
                await self._update(client, repeats=self._chance.choice((0, 0, 0, 1, 3)) if kind < 0.82 else None)

    async def open(self, client: aiohttp.ClientSession, user_id: int) -> None:
        balance = BALANCE_LIMIT - OPENING if user_id == FULL_USER else OPENING
        body = {"balance": balance, "minimumBalance": -50 if user_id % 3 == 0 else 0}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.put(f"{self._url()}/api/users/{user_id}", json=body) as answer:
                assert answer.status in (200, 201, 503), (answer.status, await answer.text())
                if answer.status != 503:
                    self.opened.add(user_id)

    async def _open(self, client: aiohttp.ClientSession) -> None:
        await self.open(client, self._chance.choice(USERS))

    def _url(self) -> str:
        return self._chance.choice(self._urls)

    def _next(self, keyed: bool) -> Asked:
        users = [HOT_USER] if self._chance.random() < 0.4 else sorted(self.opened)
        number = len(self.asked)
        key = f"key-{number}" if keyed else None
        amount = self._chance.choice((-300, -40, -7, -2, 1, 5, 40))
        asked = Asked(self._chance.choice(users), amount, key, f"request-{number}", [])
        self.asked.append(asked)
        return asked

    async def _update(self, client: aiohttp.ClientSession, repeats: int | None) -> None:
        """One change; with a key if `repeats` is given, then asked so many times again, at once or afterwards."""
        asked = self._next(keyed=repeats is not None)
        if repeats and self._chance.random() < 0.5:
            await asyncio.gather(*(self._ask(client, asked) for _ in range(1 + repeats)))
        else:
            for _ in range(1 + (repeats or 0)):
                await self._ask(client, asked)

    async def _ask(self, client: aiohttp.ClientSession, asked: Asked) -> None:
        body = {"userId": asked.user_id, "amount": asked.amount, "reference": asked.reference}
        headers = {"Idempotency-Key": asked.key} if asked.key else {}
        answer = Answer(0, None, False)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"{self._url()}/api/balance/update", json=body, headers=headers) as reply:
                found = await reply.json()
                answer = Answer(reply.status, found.get("newBalance"), "Idempotent-Replayed" in reply.headers)
        asked.answers.append(answer)

    async def _hold(self, client: aiohttp.ClientSession) -> None:
        """Place a hold, which lasts for a second or two now and then, and end it, once or several times at once."""
        users = [HOT_USER] if self._chance.random() < 0.4 else sorted(self.opened)
        asked = HoldAsked(
            self._chance.choice(users), self._chance.choice((2, 7, 40)), f"hold-{len(self.holds)}", [], []
        )
        self.holds.append(asked)
        lasting = self._chance.choice((1, 1, 2, 3_600))
        for _ in range(self._chance.choice((1, 1, 2))):
            await self._place(client, asked, lasting)
        if lasting < 3_600 and self._chance.random() < 0.6:
            await asyncio.sleep(self._chance.uniform(0, 1.5 * lasting))
        hows = self._chance.choices(("capture", "release"), k=self._chance.choice((0, 1, 1, 3)))
        await asyncio.gather(*(self._end(client, asked, how) for how in hows))

    async def _place(self, client: aiohttp.ClientSession, asked: HoldAsked, lasting: int) -> None:
        url = f"{self._url()}/api/users/{asked.user_id}/holds/{asked.hold_id}"
        status = 0
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.put(url, json={"amount": asked.amount, "expiresInSeconds": lasting}) as reply:
                await reply.read()
                status = reply.status
        asked.placings.append(status)

    async def _end(self, client: aiohttp.ClientSession, asked: HoldAsked, how: str) -> None:
        url = f"{self._url()}/api/users/{asked.user_id}/holds/{asked.hold_id}/{how}"
        body = {"amount": 1} if how == "capture" and self._chance.random() < 0.3 else {}
        ending: tuple[str, int, str | None, int | None] = (how, 0, None, None)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(url, json=body) as reply:
                found = await reply.json()
                said = found.get("status") or _SAID.get(found.get("error", ""))
                ending = (how, reply.status, said, found.get("captured"))
        asked.endings.append(ending)

    async def _bulk(self, client: aiohttp.ClientSession) -> None:
        batch = [self._next(keyed=self._chance.random() < 0.5) for _ in range(20)]
        updates = [
            {
                "userId": asked.user_id,
                "amount": asked.amount,
                "reference": asked.reference,
                "idempotencyKey": asked.key,
            }
            for asked in batch
        ]
        answers = [Answer(0, None, False)] * len(batch)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with client.post(f"{self._url()}/api/balance/updates", json={"updates": updates}) as reply:
                assert reply.status == 200, (reply.status, await reply.text())
                answers = [
                    Answer(one["status"], one.get("newBalance"), one.get("replayed", False))
                    for one in (await reply.json())["results"]
                ]
        for asked, answer in zip(batch, answers, strict=True):
            asked.answers.append(answer)


class Faults:
    """What can go wrong, one thing at a time."""

    def __init__(self, server: KillableServer, proxy: FaultProxy, services: Services, chance: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self._server = server
        self._proxy = proxy
        self._services = services
        self._chance = chance

    async def inject(self, until: float) -> None:
        """Do one after the other until the time is over; what was broken is whole again at the end."""
        faults: list[Callable[[], Awaitable[None]]] = [
            self.postmaster_killed,
            self.backend_killed,
            self.connections_cut,
            self.answers_lost,
            self.half_open,
            self.latency,
            self.row_blocked,
            self.service_killed,
            self.service_stopped,
        ]
        due: list[Callable[[], Awaitable[None]]] = []
        while time.monotonic() < until:
            await asyncio.sleep(self._chance.uniform(*CALM_SECONDS))
            due = due or self._chance.sample(faults, len(faults))  # each of them before any comes again
            fault = due.pop()
            await fault()
            self.counts[fault.__name__.replace("_", " ")] += 1

    async def postmaster_killed(self) -> None:
        self._server.kill()
        await asyncio.sleep(self._chance.choice((0, 0, 0.5, 4)))
        self._server.start()

    async def backend_killed(self) -> None:
        await self._server.kill_backend()

    async def connections_cut(self) -> None:
        self._proxy.cut()

    async def answers_lost(self) -> None:
        for link in self._proxy.links:
            link.swallow_answers()

    async def half_open(self) -> None:
        for link in self._proxy.links:
            link.swallow()

    async def latency(self) -> None:
        self._proxy.latency_seconds = self._chance.choice((0.005, 0.05))
        await asyncio.sleep(1)
        self._proxy.latency_seconds = 0

    async def row_blocked(self) -> None:
        user_id = self._chance.choice(BUSY)
        connection = await self._server.connection()
        await connection.execute("UPDATE users SET balance = balance WHERE id = %s", (user_id,))
        await asyncio.sleep(self._chance.choice((0.5, 4)))
        await connection.close()

    async def service_killed(self) -> None:
        await self._services.restart(self._chance.randrange(2), signal.SIGKILL)

    async def service_stopped(self) -> None:
        await self._services.restart(self._chance.randrange(2), signal.SIGTERM)


_SAID = {
    "The hold was captured": "captured",
    "The hold was released": "released",
    "The hold has expired": "expired",
}
_HOLDS = """
SELECT placed.user_id, placed.idempotency_key, placed.hold_amount, placed.refusal IS NOT NULL,
       CASE WHEN settled.amount < 0 THEN 'captured'
            WHEN settled.expires_at IS NOT NULL THEN 'expired'
            WHEN settled.user_id IS NOT NULL THEN 'released'
            WHEN placed.refusal IS NULL THEN 'held' END,
       nullif(-settled.amount, 0)
  FROM balance_changes AS placed
  LEFT JOIN balance_changes AS settled
    ON settled.user_id = placed.user_id AND settled.idempotency_key = ' settlement ' || placed.idempotency_key
 WHERE placed.hold_amount > 0
"""


def holds_against_the_journal(asked: list[HoldAsked], url: str) -> list[str]:
    """What was answered about holds and is not so, a line each."""
    with psycopg.connect(url) as connection:
        rows = {(user_id, hold_id): HoldRow(*row) for user_id, hold_id, *row in connection.execute(_HOLDS)}
        ((settlements, overdue),) = connection.execute(
            "SELECT (SELECT count(*) FROM balance_changes WHERE hold_amount < 0),"
            "       (SELECT count(*) FROM open_holds WHERE expires_at < clock_timestamp())"
        ).fetchall()
    wrong = [f"{overdue} holds have expired and are still open"] if overdue else []
    if settlements != sum(row.end not in (None, "held") for row in rows.values()):
        wrong.append("there are settlements of no hold")
    for one in asked:
        row = rows.pop((one.user_id, one.hold_id), None)
        if reason := _contradiction_of_hold(one, row):
            wrong.append(f"{reason}: {one}, {row}")
    return wrong + [f"a hold that nobody asked for: {row}" for row in rows.values()]


def _contradiction_of_hold(asked: HoldAsked, row: HoldRow | None) -> str | None:
    placings = set(asked.placings)
    placed = row is not None and not row.refused
    settled_by = {said for _, status, said, _ in asked.endings if status in (200, 409)}
    contradictions = {
        "an answer that may never be given": not placings <= {0, 200, 201, 400, 503, 504}
        or not {status for _, status, _, _ in asked.endings} <= {0, 200, 404, 409, 503, 504},
        "another amount": row is not None and row.amount != asked.amount,
        "answered as placed and not placed": bool(placings & {200, 201}) and not placed,
        "refused and placed": 400 in placings and (row is None or placed),
        "answered 503 and placed": placings == {503} and row is not None,
        "settled and never placed": bool(settled_by) and not placed,
        "another end": bool(settled_by) and row is not None and not settled_by <= {row.end},
        "another sum": row is not None
        and any(status == 200 and captured != row.captured for how, status, _, captured in asked.endings),
        "not found and placed": bool(placings & {200, 201}) and any(status == 404 for _, status, _, _ in asked.endings),
    }
    return next((text for text, holds in contradictions.items() if holds), None)


def held_against_the_journal(asked: list[Asked], url: str) -> list[str]:
    """What was answered and is not so, a line each."""
    rows: dict[tuple[int, str], list[Row]] = defaultdict(list)
    with psycopg.connect(url) as connection:
        for user_id, reference, *row in connection.execute(
            "SELECT user_id, reference, version, amount, balance, idempotency_key FROM balance_changes"
            " WHERE hold_amount IS NULL AND payees IS NULL AND payer IS NULL"
        ):
            rows[user_id, reference].append(Row(*row))
    wrong = []
    for one in asked:
        found = rows.pop((one.user_id, one.reference), [])
        if reason := _contradiction(one, found):
            wrong.append(f"{reason}: {one}, {found}")
    wrong += (f"a row that nobody asked for: {row}" for row in rows.values())
    return wrong


def _contradiction(asked: Asked, rows: list[Row]) -> str | None:
    statuses = {answer.status for answer in asked.answers}
    applied = [row for row in rows if row.version is not None]
    balances = {answer.new_balance for answer in asked.answers if answer.status == 200}
    contradictions = {
        "an answer that may never be given": not statuses <= {0, 200, 400, 503, 504},
        "one change, several rows": len(rows) > 1,
        "another amount": any(row.amount != asked.amount for row in rows),
        "two outcomes": {200, 400} <= statuses,
        "answered 200 and not applied": 200 in statuses and not applied,
        "refused and applied": 400 in statuses and bool(applied),
        "a refusal that is not bound to its key": 400 in statuses and asked.key is not None and not rows,
        "answered 503 and applied": statuses == {503} and bool(applied),
        "another balance": bool(applied) and not balances <= {applied[0].balance},
        "a replay without a key": asked.key is None and any(answer.replayed for answer in asked.answers),
    }
    return next((text for text, holds in contradictions.items() if holds), None)


async def soak(seconds: float, seed: int, directory: Path, progress: Callable[[float], None]) -> tuple[str, list[str]]:
    """Run it; gives a summary of what happened, and what was wrong, a line each."""
    chance = random.Random(seed)
    with killable_server(directory / "data") as server:
        socket = Path(str(conninfo_to_dict(server.url)["host"])) / ".s.PGSQL.5432"
        async with FaultProxy(socket).running() as proxy, _client() as client:
            through_proxy = f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres?sslmode=disable"
            services = Services({"DATABASE_URL": through_proxy, **SETTINGS}, directory)
            await services.start()
            try:
                load = Load(services.urls, random.Random(seed + 1))
                async with asyncio.timeout(PATIENCE_SECONDS):
                    for user_id in (*USERS[:10], FULL_USER):
                        while user_id not in load.opened:
                            await load.open(client, user_id)
                faults = Faults(server, proxy, services, chance)
                began = time.monotonic()
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(WORKERS):
                        tasks.create_task(load.work(client, began + seconds))
                    injecting = tasks.create_task(faults.inject(began + seconds))
                    while not injecting.done():
                        progress(min(1, (time.monotonic() - began) / seconds))
                        await asyncio.sleep(0.2)
                progress(1)
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while await _holds_expire(server):  # noqa: ASYNC110 - it is asked of a database
                        await asyncio.sleep(0.2)
            finally:
                await services.stop()
        wrong = held_against_the_journal(load.asked, server.url) + holds_against_the_journal(load.holds, server.url)
        wrong += transfers_against_the_journal(load.transfers.asked, server.url)
        found = verify(server.url)
        wrong += found.differences
        if found.money.made:
            wrong.append(f"money is not what it was: {found.money}")
        summary = (
            f"{len(load.asked):,} updates asked for, {_answers(load.asked)}\n"
            f"{len(load.transfers.asked):,} transfers asked for, {_answers(load.transfers.asked)}\n"
            f"{len(load.holds):,} holds; ends that were said: {_by_end(load.holds)}\n"
            f"money: {found.money.balances:,} in {found.accounts:,} accounts\n"
            f"faults: {', '.join(f'{name} {count}' for name, count in sorted(faults.counts.items()))}"
        )
        return summary, wrong


async def _holds_expire(server: KillableServer) -> bool:
    """Whether holds are open that have expired or will within seconds."""
    async with await server.connection() as connection:
        cursor = await connection.execute(
            "SELECT EXISTS (SELECT FROM open_holds WHERE expires_at < clock_timestamp() + interval '10 seconds')"
        )
        row = await cursor.fetchone()
    return bool(row and row[0])


def _answers(all_asked: Sequence[Asked | TransferAsked]) -> str:
    statuses = Counter(answer.status for asked in all_asked for answer in asked.answers)
    replays = sum(answer.replayed for asked in all_asked for answer in asked.answers)
    by_status = ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items()))
    return f"{replays:,} replays; answers by status (0: none): {by_status}"


def _by_end(holds: list[HoldAsked]) -> str:
    ends = Counter(said for one in holds for _, _, said, _ in one.endings if said)
    return ", ".join(f"{end} {count:,}" for end, count in sorted(ends.items()))


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=10)
    ) as client:
        yield client


def main() -> None:
    """Run it from the command line; exits 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Mixed load and random faults, then an audit.")
    parser.add_argument("--seconds", type=float, default=600, help="how long the load lasts (default: 600)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000, help="of all that is random")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}, {arguments.seconds:g} s", flush=True)

    def progress(share: float) -> None:
        if sys.stderr.isatty():
            bar = "#" * int(40 * share)
            print(f"\rsoak [{bar:40}] {share:4.0%}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        summary, wrong = asyncio.run(soak(arguments.seconds, arguments.seed, Path(directory), progress))
    print(summary)
    for line in wrong[:20]:
        print(line)
    print(f"{len(wrong)} wrong" if wrong else "every answer agrees with the journal, and every balance with both")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
