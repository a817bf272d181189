"""docs/clients.md: its clients get each change exactly once, and what it says is so, run out of the page itself."""

import asyncio
import doctest
import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pytest_aiohttp import AiohttpServer

from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.http.errors import PROBLEMS, error_response
from tests.database import Database
from tests.docs.pasting import bash, blocks, commands_and_answers, proxy_before, run_and_compare
from tests.fault_proxy import FaultProxy, Link
from tests.processes import ROOT, running_service

PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS = blocks(PAGE)
FILES = {"python": "settle.py", "js": "settle.mjs"}
COMMANDS = {"python": "python3 settle.py", "js": "node settle.mjs"}
LINES_MAX = 40
TIMES_MAX = 3

WITHOUT_NODE = shutil.which("node") is None and os.environ.get("CI") != "true"
LANGUAGES = [
    "python",
    pytest.param("js", marks=pytest.mark.skipif(WITHOUT_NODE, reason="Node is not installed (apt-get install nodejs)")),
]

Order = dict[str, Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the clients of the page, saved as the page says."""
    for language, name in FILES.items():
        (tmp_path / name).write_text(code(language))
    return tmp_path


def code(language: str) -> str:
    (found,) = [text for of, text in BLOCKS if of == language]
    return found


async def settled(language: str, url: str, orders: list[Order], directory: Path) -> list[tuple[str, Any]]:
    """What a client of the page says of `orders`."""
    (directory / "orders.jsonl").write_text("".join(f"{json.dumps(order)}\n" for order in orders))
    environment = {"BALANCE_URL": url, "API_TOKEN": "secret"}
    printed = await bash(f"{COMMANDS[language]} < orders.jsonl", directory, environment)
    return [tuple(json.loads(line)) for line in printed.splitlines()]


class Breaker:
    """Breaks every connection of a proxy: at once, in place of its first answer, or at any moment soon."""

    def __init__(self, proxy: FaultProxy, seed: int) -> None:
        self._random = random.Random(seed)
        self._armed: list[Link] = []
        proxy.greet = self.greet

    @property
    def answers_lost(self) -> int:
        """How many connections broke in place of their first answer."""
        return sum(link.bytes_answered > 0 for link in self._armed)

    def greet(self, link: Link) -> None:
        """Decide what becomes of a new connection."""
        fate = self._random.random()
        if fate < 0.1:
            link.cut()
        elif fate < 0.5:
            link.cut_at_answer()
            self._armed.append(link)
        else:
            asyncio.get_running_loop().call_later(self._random.uniform(0, 0.5), link.cut)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_client_gets_each_change_exactly_once_over_connections_that_break(
    language: str, database: Database, directory: Path
) -> None:
    database.open({1: 100, 2: 0})
    withdrawals = [{"userId": 1, "amount": -2, "key": f"order-{n}", "reference": f"order {n}"} for n in range(100)]
    deposits = [{"userId": 2, "amount": n + 1, "key": f"order-{n}", "reference": None} for n in range(50)]
    orders = {(order["userId"], order["key"]): order for order in withdrawals + deposits}
    states: dict[tuple[Any, Any], tuple[str, Any]] = {}
    environment = {"DATABASE_URL": database.url, "API_TOKEN": "secret"}
    async with running_service(environment, directory) as service, proxy_before(service) as proxy:
        breaker = Breaker(proxy, seed=4711)
        for _ in range(TIMES_MAX):  # what is open is asked for again, as the page says
            rest = [order for key, order in orders.items() if key not in states]
            if not rest:
                break
            found = await settled(language, f"http://127.0.0.1:{proxy.port}", rest, directory)
            for order, state in zip(rest, found, strict=True):
                if state[0] != "open":
                    states[order["userId"], order["key"]] = state
    assert states.keys() == orders.keys()
    assert breaker.answers_lost > 10
    assert Counter(state for (user_id, _), (state, _) in states.items() if user_id == 1) == {
        "applied": 50,
        "refused": 50,
    }
    assert (database.balance(1), database.balance(2)) == (0, 50 * 51 // 2)
    for user_id in (1, 2):
        journal = database.journal(user_id)
        assert {row.key: row.balance for row in journal if row.refusal is None} == {
            key: detail for (of, key), (state, detail) in states.items() if (of, state) == (user_id, "applied")
        }
        assert len(journal) == sum(of == user_id for of, _ in orders)


# The table of answers


def rows() -> list[tuple[set[int], set[str], str]]:
    """The table: the statuses of a row, the texts that it is for (none: all others), and what to do."""
    table = PAGE[PAGE.index("| answer |") : PAGE.index("\n\n", PAGE.index("| answer |"))]
    found = []
    for line in table.splitlines()[2:]:
        answer, _, advice = line.strip("| ").split(" | ")
        texts = set(re.findall("`(.*?)`", answer))
        word = re.match(r"\*\*(Done|Stop|Ask again)\b", advice)
        assert word, line
        found.append(({int(status) for status in re.findall(r"\b\d{3}\b", answer)}, texts, word[1]))
    return found


def advice(status: int, text: str) -> str:
    """What the table says to do after an answer."""
    of_status = [(texts, word) for statuses, texts, word in rows() if status in statuses]
    of_text = [word for texts, word in of_status if text in texts]
    (found,) = of_text or [word for texts, word in of_status if not texts or len(of_status) == 1]
    return found


def test_the_table_has_every_status_of_the_service() -> None:
    assert {problem.status for problem in PROBLEMS.values()} | {200} <= {
        status for statuses, _, _ in rows() for status in statuses
    }


def of_a_proxy(status: int, retry_after: str | None = None) -> web.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return web.Response(status=status, text="<html>", content_type="text/html", headers=headers)


@pytest.mark.parametrize("language", LANGUAGES)
async def test_a_client_does_what_the_table_says(language: str, aiohttp_server: AiohttpServer, directory: Path) -> None:
    """Each order gets one of the answers that there are: once, and then 200, if it is to be asked for again."""
    (endpoint,) = [endpoint for endpoint in ENDPOINTS if endpoint.path == "/api/balance/update"]
    codes = {*endpoint.errors, "not_found", "method_not_allowed"}
    of_proxies = {"403": 403, "429": 429, "502": 502, "503-at-a-time": 503}
    expected = {"broken": "Ask again"}
    expected |= {code: advice(PROBLEMS[code].status, PROBLEMS[code].text) for code in codes}
    expected |= {name: advice(status, "") for name, status in of_proxies.items()}
    assert {key for key, word in expected.items() if word == "Done"} == {"insufficient_funds", "balance_limit_exceeded"}
    requests: dict[str, list[tuple[float, bytes]]] = {key: [] for key in expected}

    async def update(request: web.Request) -> web.StreamResponse:
        key = request.headers["Idempotency-Key"]
        requests[key].append((asyncio.get_running_loop().time(), await request.read()))
        if expected[key] == "Ask again" and len(requests[key]) > 1:
            return web.json_response({"userId": 1, "newBalance": 98})
        if key in codes:
            return error_response(request, key)
        if key in of_proxies:
            return of_a_proxy(of_proxies[key], "Thu, 01 Jan 2026 00:00:00 GMT" if "time" in key else None)
        assert request.transport
        request.transport.abort()
        return web.Response()

    app = web.Application()
    app.router.add_post("/api/balance/update", update)
    server = await aiohttp_server(app)
    orders: list[Order] = [{"userId": 1, "amount": -2, "key": key, "reference": "here"} for key in expected]
    states = await settled(language, str(server.make_url("")).rstrip("/"), orders, directory)
    failure_of = {"Done": "refused", "Stop": "open", "Ask again": "applied"}
    assert [(key, state) for key, (state, _) in zip(expected, states, strict=True)] == [
        (key, failure_of[word]) for key, word in expected.items()
    ]
    # A fetch that keeps to its standard asks again by itself, once, after a 421.
    may_repeat = {key for key, word in expected.items() if word == "Ask again"} | {"misdirected_request"}
    for key, asked in requests.items():
        times, bodies = zip(*asked, strict=True)
        assert (key, len(times)) in ((key, 1), (key, 2 if key in may_repeat else 1))
        assert len(set(bodies)) == 1
        if key == "turned_away":
            assert times[1] - times[0] >= 1  # the seconds in Retry-After


# The rest of the page


def test_the_clients_are_short() -> None:
    assert {language: len(code(language).splitlines()) <= LINES_MAX for language in FILES} == dict.fromkeys(FILES, True)


async def test_the_commands_work_as_pasted_and_print_what_the_page_says(database: Database, directory: Path) -> None:
    """In their order, in one shell; only the port is another one, and the answer to the first payment is lost."""
    pairs = commands_and_answers(BLOCKS)
    if WITHOUT_NODE:
        pairs = [pair for pair in pairs if not pair[0].startswith("node ")]
    async with running_service({"DATABASE_URL": database.url}, directory) as service, proxy_before(service) as proxy:
        struck = proxy.strike(b"order-4711-payment", Link.cut_at_answer)
        await run_and_compare(pairs, proxy.port, directory)
        assert struck.done()
    assert [row.amount for row in database.journal(4711) if row.refusal is None] == [-200, -100, -150]


def test_the_tables_of_the_page_can_be_made(database: Database) -> None:
    for language, text in BLOCKS:
        if language == "sql":
            database.execute(text)
    database.execute("INSERT INTO payments (key, user_id, amount) VALUES ('order-4711-payment', 1, -200)")
    database.execute("INSERT INTO accounts (customer, currency) VALUES (gen_random_uuid(), 'EUR')")
    assert database.execute("SELECT state FROM payments") == [("open",)]
    assert database.execute("SELECT user_id FROM accounts") == [(1,)]


def test_the_python_examples_say_what_the_page_says() -> None:
    (example,) = [text for language, text in BLOCKS if language == "pycon"]
    test = doctest.DocTestParser().get_doctest(example, {}, "docs/clients.md", None, None)
    assert doctest.DocTestRunner().run(test) == (0, 3)
