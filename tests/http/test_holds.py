"""The contract of holds: place, capture, release, read and list, each answer as a caller gets it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pytest_aiohttp import AiohttpClient
from yarl import URL

from atomic_balance.http.app import make_app
from atomic_balance.postgres.accounts import Accounts
from atomic_balance.postgres.failures import UnreachableError
from atomic_balance.settings import Settings
from tests.client import Client, opened, update
from tests.database import Database, until
from tests.fault_proxy import Link

LIMIT = 2**53 - 1
HOLD = "/api/users/1/holds/order-4711"
KEY_REUSED = 422, {"error": "holdId: already used as the key of another change of this user"}, False
NO_HOLD = 404, {"error": "Hold not found"}, False
FUNDS = {"error": "Insufficient funds"}
YEAR_SECONDS = 365 * 24 * 3600

pytestmark = pytest.mark.over_both_statements

Answer = tuple[int, dict[str, Any], bool]


async def ask(client: Client, method: str, path: str, body: Any = None, key: str | None = None) -> Answer:
    """Status, body, and whether the answer is marked as replayed. `body`: bytes are sent as they are."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if key is not None:
        headers["Idempotency-Key"] = key
    async with client.request(method, URL(path, encoded=True), data=data, headers=headers) as answer:
        return answer.status, await answer.json(), "Idempotent-Replayed" in answer.headers


async def placed(client: Client, amount: int = 500, path: str = HOLD, **more: Any) -> dict[str, Any]:
    """Place a hold; the answer's body."""
    status, body, replayed = await ask(client, "PUT", path, {"amount": amount, **more})
    assert (status, replayed) == (201, False)
    return body


async def account(client: Client, user_id: int = 1) -> tuple[int, int, int, int]:
    """Balance, held, available and version."""
    _, body, _ = await ask(client, "GET", f"/api/users/{user_id}")
    return body["balance"], body["held"], body["available"], body["version"]


def keep_expired(database: Database) -> None:
    """Let no service of this database settle what has expired."""
    database.execute("UPDATE expiry_turn SET holder = 'nobody', until = 'infinity'")


def expire(database: Database) -> None:
    """Let the time of every hold be over."""
    for table in ("open_holds", "balance_changes"):
        database.execute(f"UPDATE {table} SET expires_at = now() - interval '1 second' WHERE expires_at IS NOT NULL")


# Placing


@pytest.mark.on_a_cluster
async def test_a_hold_sets_money_aside_and_leaves_the_balance(client: Client) -> None:
    await opened(client, 10_000)
    before = datetime.now(UTC)
    hold = await placed(client, 500, expiresInSeconds=900, reference="cart")
    expires_at = datetime.fromisoformat(hold["expiresAt"])
    assert timedelta(0) <= expires_at - before - timedelta(seconds=900) <= timedelta(seconds=60)
    assert hold["expiresAt"].endswith("Z")
    assert hold == {
        "userId": 1,
        "holdId": "order-4711",
        "amount": 500,
        "reference": "cart",
        "status": "held",
        "expiresAt": hold["expiresAt"],
    }
    assert await account(client) == (10_000, 500, 9_500, 1)
    assert await ask(client, "GET", HOLD) == (200, hold, False)


@pytest.mark.on_a_cluster
async def test_a_hold_lasts_a_week_unless_said_otherwise_and_a_year_at_most(client: Client) -> None:
    await opened(client, 10_000)
    for path, seconds, more in (
        ("/api/users/1/holds/a", 7 * 24 * 3600, {}),
        ("/api/users/1/holds/b", YEAR_SECONDS, {"expiresInSeconds": YEAR_SECONDS}),
    ):
        before = datetime.now(UTC)
        expires_at = datetime.fromisoformat((await placed(client, 1, path, **more))["expiresAt"])
        assert timedelta(0) <= expires_at - before - timedelta(seconds=seconds) <= timedelta(seconds=60)


@pytest.mark.on_a_cluster
async def test_placed_again_it_is_the_same_hold_as_it_is_now(client: Client) -> None:
    """Its expiry is not compared: the first one stands."""
    await opened(client)
    hold = await placed(client, reference="r")
    again = {"amount": 500, "reference": "r", "expiresInSeconds": 5}
    assert await ask(client, "PUT", HOLD, again) == (200, hold, True)
    await ask(client, "POST", f"{HOLD}/capture", {"amount": 100})
    captured = {**hold, "status": "captured", "captured": 100, "newBalance": 9_900}
    assert await ask(client, "PUT", HOLD, again) == (200, captured, True)
    assert await account(client) == (9_900, 0, 9_900, 2)


@pytest.mark.parametrize("other", [{"amount": 501}, {"amount": 500, "reference": "other"}])
@pytest.mark.on_a_cluster
async def test_placed_again_otherwise_is_409(client: Client, other: dict[str, Any]) -> None:
    await opened(client)
    await placed(client)
    exists = 409, {"error": "Hold exists with another amount or reference"}, False
    assert await ask(client, "PUT", HOLD, other) == exists
    await ask(client, "POST", f"{HOLD}/release")
    assert await ask(client, "PUT", HOLD, other) == exists
    assert await account(client) == (10_000, 0, 10_000, 2)


@pytest.mark.on_a_cluster
async def test_the_id_of_a_hold_shares_its_space_with_the_keys_of_updates(client: Client) -> None:
    await opened(client)
    await update(client, -1, headers={"Idempotency-Key": "order-4711"})
    assert await ask(client, "PUT", HOLD, {"amount": 500}) == KEY_REUSED
    await placed(client, 500, "/api/users/1/holds/h")
    body = {"userId": 1, "amount": -1}
    key_reused = 422, {"error": "Idempotency-Key: already used for another change of this user"}, False
    assert await ask(client, "POST", "/api/balance/update", body, "h") == key_reused
    assert await ask(client, "GET", HOLD) == NO_HOLD
    assert await ask(client, "POST", f"{HOLD}/capture") == NO_HOLD
    assert await account(client) == (9_999, 500, 9_499, 2)


@pytest.mark.on_a_cluster
async def test_a_hold_of_another_user_is_another_hold(client: Client) -> None:
    await opened(client)
    await opened(client, user_id=2)
    await placed(client)
    await placed(client, 7, "/api/users/2/holds/order-4711")
    await ask(client, "POST", f"{HOLD}/capture")
    assert await account(client, 2) == (10_000, 7, 9_993, 1)


@pytest.mark.on_a_cluster
async def test_a_hold_that_is_not_covered_is_refused_for_good(client: Client) -> None:
    await opened(client, 499)
    assert await ask(client, "PUT", HOLD, {"amount": 500}) == (400, FUNDS, False)
    await update(client, 1_000)
    assert await ask(client, "PUT", HOLD, {"amount": 500}) == (400, FUNDS, True)
    assert await ask(client, "PUT", HOLD, {"amount": 501}) == KEY_REUSED
    assert await ask(client, "GET", HOLD) == NO_HOLD
    for settlement in ("capture", "release"):
        assert await ask(client, "POST", f"{HOLD}/{settlement}") == NO_HOLD
    assert await account(client) == (1_499, 0, 1_499, 1)


@pytest.mark.on_a_cluster
async def test_what_is_held_can_be_neither_held_nor_withdrawn_again(client: Client) -> None:
    await opened(client, 10)
    await placed(client, 8)
    assert await ask(client, "PUT", "/api/users/1/holds/b", {"amount": 3}) == (400, FUNDS, False)
    assert await update(client, -3) == (400, '{"error":"Insufficient funds"}')
    assert await update(client, -2) == (200, '{"userId":1,"newBalance":8}')
    assert await update(client, -1) == (400, '{"error":"Insufficient funds"}')
    assert await account(client) == (8, 8, 0, 2)


@pytest.mark.on_a_cluster
async def test_an_overdraft_can_be_held(client: Client) -> None:
    await ask(client, "PUT", "/api/users/1", {"balance": 0, "minimumBalance": -10})
    await placed(client, 10)
    assert await account(client) == (0, 10, 0, 1)
    _, body, _ = await ask(client, "POST", f"{HOLD}/capture")
    assert body["newBalance"] == -10


@pytest.mark.on_a_cluster
async def test_the_minimum_balance_never_touches_held_money(client: Client) -> None:
    await opened(client, 10)
    await placed(client, 8)
    too_high = 409, {"error": "The balance is below this minimum"}, False
    assert await ask(client, "PATCH", "/api/users/1", {"minimumBalance": 3}) == too_high
    set_to_2 = {"userId": 1, "balance": 10, "held": 8, "available": 0, "minimumBalance": 2, "version": 1}
    assert await ask(client, "PATCH", "/api/users/1", {"minimumBalance": 2}) == (200, set_to_2, False)
    _, body, _ = await ask(client, "POST", f"{HOLD}/capture")
    assert body["newBalance"] == 2


@pytest.mark.on_a_cluster
async def test_opening_again_shows_what_is_held(client: Client) -> None:
    await opened(client, 10)
    await placed(client, 8)
    shown = {"userId": 1, "balance": 10, "held": 8, "available": 2, "minimumBalance": 0, "version": 1}
    assert await ask(client, "PUT", "/api/users/1", {"balance": 10}) == (200, shown, False)
    assert await ask(client, "GET", "/api/users/1") == (200, shown, False)


@pytest.mark.on_a_cluster
async def test_a_hold_of_nobody(client: Client) -> None:
    nobody = 404, {"error": "User not found"}, False
    assert await ask(client, "PUT", HOLD, {"amount": 1}) == nobody
    assert await ask(client, "GET", "/api/users/1/holds") == nobody
    for method, path in (("GET", HOLD), ("POST", f"{HOLD}/capture"), ("POST", f"{HOLD}/release")):
        assert await ask(client, method, path) == NO_HOLD
    await opened(client)
    await placed(client)  # the 404 bound nothing


# Capturing


@pytest.mark.parametrize("body", [None, b"{}", b'{"amount":500}', b'{"amount":null}'])
@pytest.mark.on_a_cluster
async def test_capturing_all(client: Client, body: bytes | None) -> None:
    await opened(client)
    hold = await placed(client)
    captured = {**hold, "status": "captured", "captured": 500, "newBalance": 9_500}
    assert await ask(client, "POST", f"{HOLD}/capture", body) == (200, captured, False)
    assert await account(client) == (9_500, 0, 9_500, 2)
    again: Any
    for again in (None, {}, {"amount": 500}):
        assert await ask(client, "POST", f"{HOLD}/capture", again) == (200, captured, True)
    assert await ask(client, "GET", HOLD) == (200, captured, False)


@pytest.mark.on_a_cluster
async def test_capturing_a_part_releases_the_rest_and_says_the_same_again(client: Client) -> None:
    await opened(client)
    hold = await placed(client)
    captured = {**hold, "status": "captured", "captured": 450, "newBalance": 9_550}
    assert await ask(client, "POST", f"{HOLD}/capture", {"amount": 450}) == (200, captured, False)
    await update(client, -50)
    assert await ask(client, "POST", f"{HOLD}/capture", {"amount": 450}) == (200, captured, True)
    assert await account(client) == (9_500, 0, 9_500, 3)


@pytest.mark.on_a_cluster
async def test_capturing_more_than_is_held_is_400_and_the_hold_stays_open(client: Client) -> None:
    await opened(client)
    hold = await placed(client)
    error = {"error": "amount: expected no more than is held, 500"}
    assert await ask(client, "POST", f"{HOLD}/capture", {"amount": 501}) == (400, error, False)
    assert await ask(client, "GET", HOLD) == (200, hold, False)
    assert (await ask(client, "POST", f"{HOLD}/capture"))[0] == 200


@pytest.mark.on_a_cluster
async def test_capturing_otherwise_is_409(client: Client) -> None:
    await opened(client)
    await placed(client)
    await ask(client, "POST", f"{HOLD}/capture", {"amount": 450})
    for otherwise in (None, {"amount": 449}):
        captured = 409, {"error": "The hold was captured"}, False
        assert await ask(client, "POST", f"{HOLD}/capture", otherwise) == captured
    assert await account(client) == (9_550, 0, 9_550, 2)


@pytest.mark.on_a_cluster
async def test_capturing_after_a_release_is_409(client: Client) -> None:
    await opened(client)
    await placed(client)
    await ask(client, "POST", f"{HOLD}/release")
    assert await ask(client, "POST", f"{HOLD}/capture") == (409, {"error": "The hold was released"}, False)
    assert await account(client) == (10_000, 0, 10_000, 2)


@pytest.mark.on_a_cluster
async def test_capturing_after_the_expiry_is_409_and_settles_it(client: Client, database: Database) -> None:
    """Not by the clock alone: what was told to the caller is bound."""
    keep_expired(database)
    await opened(client)
    await placed(client)
    expire(database)
    expired = 409, {"error": "The hold has expired"}, False
    assert (await ask(client, "GET", HOLD))[1]["status"] == "held"
    assert await ask(client, "POST", f"{HOLD}/capture") == expired
    assert await account(client) == (10_000, 0, 10_000, 2)
    assert await ask(client, "POST", f"{HOLD}/capture") == expired
    assert (await ask(client, "GET", HOLD))[1]["status"] == "expired"


async def test_a_late_capture_is_told_what_becomes_of_one_that_came_in_time(client: Client, database: Database) -> None:
    """The first still waits for its row when the hold's time is over: it counts, or none does."""
    keep_expired(database)
    await opened(client)
    await placed(client)
    with database.holding(1):
        in_time = asyncio.create_task(ask(client, "POST", f"{HOLD}/capture"))
        await until(database.blocked)
        expire(database)
        late = asyncio.create_task(ask(client, "POST", f"{HOLD}/capture"))
        otherwise = asyncio.create_task(ask(client, "POST", f"{HOLD}/capture", {"amount": 1}))
        await asyncio.sleep(0.2)
        assert not late.done()
        assert (await ask(client, "GET", HOLD))[1]["status"] == "held"
    status, captured, _ = await in_time
    assert (status, captured["status"]) == (200, "captured")
    status, told, replayed = await late
    assert (status, told["status"], told["newBalance"], replayed) == (200, "captured", captured["newBalance"], True)
    assert await otherwise == (409, {"error": "The hold was captured"}, False)


@pytest.mark.parametrize("lost", [Link.cut, Link.cut_at_answer])
async def test_a_hold_whose_statement_was_lost_is_told_as_it_is(
    database: Database, aiohttp_client: AiohttpClient, lost: Callable[[Link], None]
) -> None:
    """It may have been placed long before, and be settled: then nothing is set aside."""
    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(Settings(database_url=url)))
        await opened(client)
        struck = proxy.strike(b"order-4711", lost)
        assert (await placed(client))["status"] == "held"
        assert struck.done()
        assert (await ask(client, "POST", f"{HOLD}/release"))[0] == 200
        struck = proxy.strike(b"order-4711", lost)
        status, told, _ = await ask(client, "PUT", HOLD, {"amount": 500})
        assert struck.done()
        assert (status, told["status"]) == (200, "released")


async def test_a_hold_whose_statement_was_lost_and_that_cannot_be_read_is_unknown(
    database: Database, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: object) -> None:
        raise UnreachableError

    async with database.proxied() as (proxy, url):
        client = await aiohttp_client(make_app(Settings(database_url=url)))
        await opened(client)
        monkeypatch.setattr(Accounts, "hold", unreachable)
        struck = proxy.strike(b"order-4711", Link.cut_at_answer)
        unknown = 504, {"error": "Outcome unknown: ask again"}, False
        assert await ask(client, "PUT", HOLD, {"amount": 500}) == unknown
        assert struck.done()


async def test_two_holds_with_one_id_at_once(client: Client, database: Database) -> None:
    await opened(client)
    with database.holding(1):
        first = asyncio.create_task(ask(client, "PUT", HOLD, {"amount": 1}))
        await until(database.blocked)
        other = asyncio.create_task(ask(client, "PUT", HOLD, {"amount": 2}))
        await asyncio.sleep(0.2)
        assert not other.done()  # which of them the id belongs to is not decided yet
    assert (await first)[0] == 201
    assert await other == (409, {"error": "Hold exists with another amount or reference"}, False)


@pytest.mark.on_a_cluster
async def test_an_empty_body_in_chunks_is_no_body(client: Client) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        return
        yield b""

    await opened(client)
    await placed(client)
    async with client.post(f"{HOLD}/release", data=nothing()) as answer:
        assert answer.status == 200


# Releasing


@pytest.mark.parametrize("body", [None, b"{}"])
@pytest.mark.on_a_cluster
async def test_releasing(client: Client, body: bytes | None) -> None:
    await opened(client)
    hold = await placed(client)
    released = {**hold, "status": "released"}
    assert await ask(client, "POST", f"{HOLD}/release", body) == (200, released, False)
    assert await account(client) == (10_000, 0, 10_000, 2)
    again: Any
    for again in (None, {}):
        assert await ask(client, "POST", f"{HOLD}/release", again) == (200, released, True)
    assert await ask(client, "GET", HOLD) == (200, released, False)
    assert await account(client) == (10_000, 0, 10_000, 2)


@pytest.mark.on_a_cluster
async def test_releasing_what_has_expired_is_its_expiry(client: Client, database: Database) -> None:
    keep_expired(database)
    await opened(client)
    await placed(client)
    expire(database)
    status, body, replayed = await ask(client, "POST", f"{HOLD}/release")
    assert (status, body["status"], replayed) == (200, "expired", False)
    assert await account(client) == (10_000, 0, 10_000, 2)
    assert await ask(client, "POST", f"{HOLD}/release") == (200, body, True)
    assert await ask(client, "GET", HOLD) == (200, body, False)
    assert await ask(client, "POST", f"{HOLD}/capture") == (409, {"error": "The hold has expired"}, False)
    assert await account(client) == (10_000, 0, 10_000, 2)


@pytest.mark.on_a_cluster
async def test_releasing_what_was_captured_is_409(client: Client) -> None:
    await opened(client)
    await placed(client)
    await ask(client, "POST", f"{HOLD}/capture", {"amount": 1})
    assert await ask(client, "POST", f"{HOLD}/release") == (409, {"error": "The hold was captured"}, False)
    assert await account(client) == (9_999, 0, 9_999, 2)


# Reading


@pytest.mark.on_a_cluster
async def test_the_open_holds_in_pages_by_id(client: Client) -> None:
    await opened(client)
    ids = ["null", "a/b+c%", "Z", "a?b&c=#", "~", "0", "%2F", "settled"]
    for hold_id in ids:
        await placed(client, 1, f"/api/users/1/holds/{''.join(f'%{ord(one):02X}' for one in hold_id)}")
    await ask(client, "POST", "/api/users/1/holds/settled/release")
    open_ids = sorted(ids[:-1])
    for limit in (1, 3, len(open_ids), 1_000):
        path: str | None = f"/api/users/1/holds?limit={limit}"
        pages: list[list[dict[str, Any]]] = []
        while path is not None:
            status, page, _ = await ask(client, "GET", path)
            assert status == 200, (path, page)
            pages.append(page["holds"])
            path = page["next"]
        assert [hold["holdId"] for page in pages for hold in page] == open_ids
        assert {len(page) for page in pages[:-1]} <= {limit}
        assert pages[-1]
    _, page, _ = await ask(client, "GET", "/api/users/1/holds")
    assert [hold["holdId"] for hold in page["holds"]] == open_ids
    for hold in page["holds"]:
        path = f"/api/users/1/holds/{''.join(f'%{ord(one):02X}' for one in hold['holdId'])}"
        assert await ask(client, "GET", path) == (200, hold, False)


@pytest.mark.on_a_cluster
async def test_an_account_without_holds(client: Client) -> None:
    await opened(client)
    assert await ask(client, "GET", "/api/users/1/holds") == (200, {"holds": [], "next": None}, False)


@pytest.mark.on_a_cluster
async def test_every_visible_character_of_an_id_is_kept(client: Client) -> None:
    """Each alone and all together; a plus or a percent sign stands for nothing but itself."""
    characters = [chr(code) for code in range(0x21, 0x7F)]
    await opened(client)
    for hold_id in [*characters, "".join(characters), "a%2Fb", "x" * 255]:
        path = f"/api/users/1/holds/{''.join(f'%{ord(one):02x}' for one in hold_id)}"
        hold = await placed(client, 1, path)
        assert hold["holdId"] == hold_id
        assert (await ask(client, "POST", f"{path}/capture"))[0] == 200, hold_id
        assert (await ask(client, "GET", path))[1]["status"] == "captured"
    assert await account(client) == (10_000 - 97, 0, 10_000 - 97, 2 * 97)


@pytest.mark.on_a_cluster
async def test_the_journal_shows_what_each_change_added_to_what_is_held(client: Client) -> None:
    """Its settlement's key is the service's own, and is not shown."""
    await opened(client)
    await placed(client, reference="cart")
    await ask(client, "POST", f"{HOLD}/capture", {"amount": 450})
    await placed(client, 7, "/api/users/1/holds/b")
    await ask(client, "POST", "/api/users/1/holds/b/release")
    await update(client, -1)
    _, page, _ = await ask(client, "GET", "/api/users/1/changes")
    names = ("version", "amount", "holdAmount", "balance", "reference", "idempotencyKey")
    assert [tuple(entry[name] for name in names) for entry in page["changes"]] == [
        (5, -1, 0, 9_549, None, None),
        (4, 0, -7, 9_550, None, None),
        (3, 0, 7, 9_550, None, "b"),
        (2, -450, -500, 9_550, None, None),
        (1, 0, 500, 10_000, "cart", "order-4711"),
        (0, 10_000, 0, 10_000, None, None),
    ]


@pytest.mark.on_a_cluster
async def test_what_is_bound_to_the_id_of_a_hold_can_be_read(client: Client) -> None:
    await opened(client)
    await placed(client, reference="r")
    await ask(client, "POST", f"{HOLD}/capture")
    await ask(client, "PUT", "/api/users/1/holds/refused", {"amount": 10_000})
    bound = {"userId": 1, "amount": 0}
    for key, rest in (
        (
            "order-4711",
            {"status": 201, "reference": "r", "holdAmount": 500, "version": 1, "newBalance": 10_000},
        ),
        ("refused", {"status": 400, "reference": None, "holdAmount": 10_000, **FUNDS}),
    ):
        status, body, _ = await ask(client, "GET", f"/api/users/1/changes/{key}")
        del body["createdAt"]
        assert (status, body) == (200, {**bound, "idempotencyKey": key, **rest})
    settlement = "%20settlement%20order-4711"
    error = {"error": "key: expected 1 to 255 visible ASCII characters"}
    assert await ask(client, "GET", f"/api/users/1/changes/{settlement}") == (400, error, False)


# Bad input

POSITIVE = f"amount: expected an integer from 1 to {LIMIT}"
LASTING = f"expiresInSeconds: expected a number of seconds, 1 to {YEAR_SECONDS}"
REFERENCE = "reference: expected a string of up to 255 characters without NUL, or null"
BODY = "body: expected JSON in UTF-8"
ID = "holdId: expected 1 to 255 visible ASCII characters"


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", BODY),
        (b"{", BODY),
        (b"[]", "body: expected a JSON object"),
        (b"{}", POSITIVE),
        *(
            (b'{"amount":%s}' % amount, POSITIVE)
            for amount in (b"0", b"-1", b"1.0", b'"1"', b"null", b"true", b"%d" % 2**53)
        ),
        *(
            (b'{"amount":1,"expiresInSeconds":%s}' % seconds, LASTING)
            for seconds in (b"0", b"-1", b"1.5", b'"60"', b"null", b"%d" % (YEAR_SECONDS + 1))
        ),
        *(
            (b'{"amount":1,"reference":%s}' % reference, REFERENCE)
            for reference in (b"1", b'"a\\u0000"', b'"%s"' % (b"x" * 256))
        ),
        (b'{"amount":1,"expiresAt":"2026-01-31T12:00:00Z"}', "expiresAt: expected no such member"),
        (b'{"amount":1,"holdId":"a"}', "holdId: expected no such member"),
    ],
)
@pytest.mark.on_a_cluster
async def test_bad_input_to_a_hold_names_the_member_and_changes_nothing(
    client: Client, body: bytes, error: str
) -> None:
    await opened(client)
    assert await ask(client, "PUT", HOLD, body) == (400, {"error": error}, False)
    assert await account(client) == (10_000, 0, 10_000, 0)
    await placed(client)


@pytest.mark.parametrize(
    ("settlement", "body", "error"),
    [
        ("capture", b"{", BODY),
        ("capture", b"[]", "body: expected a JSON object"),
        *(
            ("capture", b'{"amount":%s}' % amount, POSITIVE)
            for amount in (b"0", b"-1", b"1.5", b'"1"', b"true", b"%d" % 2**53)
        ),
        ("capture", b'{"reference":"r"}', "reference: expected no such member"),
        ("release", b"{", BODY),
        ("release", b"[]", "body: expected a JSON object"),
        ("release", b'{"amount":1}', "amount: expected no such member"),
    ],
)
@pytest.mark.on_a_cluster
async def test_bad_input_to_a_settlement_names_the_member_and_leaves_the_hold_open(
    client: Client, settlement: str, body: bytes, error: str
) -> None:
    await opened(client)
    hold = await placed(client)
    assert await ask(client, "POST", f"{HOLD}/{settlement}", body) == (400, {"error": error}, False)
    assert await ask(client, "GET", HOLD) == (200, hold, False)
    assert await account(client) == (10_000, 500, 9_500, 1)


@pytest.mark.parametrize("hold_id", ["%20", "a%20b", "%00", "%C3%A9", "x" * 256])
@pytest.mark.on_a_cluster
async def test_a_bad_id_in_the_path(client: Client, hold_id: str) -> None:
    await opened(client)
    path = f"/api/users/1/holds/{hold_id}"
    for method, place, body in (
        ("PUT", path, {"amount": 1}),
        ("POST", f"{path}/capture", None),
        ("POST", f"{path}/release", None),
        ("GET", path, None),
    ):
        assert await ask(client, method, place, body) == (400, {"error": ID}, False)
    for method, place, body in (("PUT", "/api/users/0/holds/a", {"amount": 1}), ("GET", "/api/users/0/holds", None)):
        error = {"error": f"userId: expected an integer from 1 to {LIMIT}"}
        assert await ask(client, method, place, body) == (400, error, False)
    assert await account(client) == (10_000, 0, 10_000, 0)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("limit=0", "limit: expected an integer from 1 to 1000"),
        ("limit=1001", "limit: expected an integer from 1 to 1000"),
        ("limit=01", "limit: expected an integer from 1 to 1000"),
        ("after=", "after: expected 1 to 255 visible ASCII characters"),
        ("after=a%20b", "after: expected 1 to 255 visible ASCII characters"),
        ("before=a", "before: expected no such member"),
        ("after=a&after=b", "query: expected each parameter at most once"),
    ],
)
@pytest.mark.on_a_cluster
async def test_a_bad_page_of_holds(client: Client, query: str, error: str) -> None:
    assert await ask(client, "GET", f"/api/users/1/holds?{query}") == (400, {"error": error}, False)


@pytest.mark.on_a_cluster
async def test_a_body_of_another_type(client: Client) -> None:
    await opened(client)
    await placed(client)
    for method, path in (("PUT", HOLD), ("POST", f"{HOLD}/capture"), ("POST", f"{HOLD}/release")):
        async with client.request(method, path, data=b"{}", headers={"Content-Type": "text/plain"}) as answer:
            assert (answer.status, await answer.json()) == (415, {"error": "Content-Type: expected application/json"})
    assert await account(client) == (10_000, 500, 9_500, 1)
