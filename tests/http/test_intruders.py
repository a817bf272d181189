"""Those who may not ask, and those who send what is no request: they learn nothing, and flood nothing."""

import asyncio
import io
import json
import logging
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
from msgspec.structs import replace
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.observe.logs import JsonLines
from atomic_balance.settings import Settings
from tests.client import Client
from tests.database import Database
from tests.processes import ROOT, running_service

UNAUTHORIZED = '{"error":"Authorization: expected Bearer and a token of this API"}'
FORBIDDEN = '{"error":"Authorization: expected a token that may write, this one may only read"}'


@pytest.fixture
async def guarded(aiohttp_client: AiohttpClient, settings: Settings) -> Client:
    return await aiohttp_client(make_app(replace(settings, api_token="first,second", read_token="look")))


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer third", "Bearer first,second", "Basic first", "first"]
)
async def test_without_a_token_nothing_is_answered_but_health(guarded: Client, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization is not None else {}
    for endpoint in ENDPOINTS:
        path = endpoint.path.format(userId=1, key="k", holdId="h")
        async with guarded.request(endpoint.method, path, json={"balance": 1}, headers=headers) as answer:
            text = await answer.text()
            if path in ("/healthz", "/readyz"):
                assert answer.status == 200
                continue
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert text == UNAUTHORIZED or answer.content_type == "text/html"
    async with guarded.get("/nothing", headers=headers) as answer:
        assert answer.status == 401


@pytest.mark.parametrize("authorization", ["Bearer first", "bearer second", "Bearer  second "])
async def test_each_token_lets_pass(guarded: Client, authorization: str) -> None:
    async with guarded.put("/api/users/1", json={"balance": 1}, headers={"Authorization": authorization}) as answer:
        assert answer.status == 201


async def test_a_token_to_read_reads_and_changes_nothing(guarded: Client) -> None:
    async with guarded.put("/api/users/1", json={"balance": 1}, headers={"Authorization": "Bearer first"}) as answer:
        assert answer.status == 201
    headers = {"Authorization": "Bearer look"}
    for endpoint in ENDPOINTS:
        path = endpoint.path.format(userId=1, key="k", holdId="h")
        body = None if endpoint.body is None else next(iter(endpoint.examples.values()))
        async with guarded.request(endpoint.method, path, json=body, headers=headers) as answer:
            if endpoint.method == "GET":
                missing = endpoint.path.endswith(("{key}", "{holdId}", "/live/total"))
                assert answer.status == (404 if missing else 200)
            else:
                assert (answer.status, await answer.text()) == (403, FORBIDDEN)
    async with guarded.head("/api/users/1", headers=headers) as answer:
        assert answer.status == 200
    async with guarded.delete("/nothing", headers=headers) as answer:
        assert answer.status == 403
    async with guarded.get("/api/users/1", headers=headers) as answer:
        account = await answer.json()
        assert (account["balance"], account["minimumBalance"], account["version"]) == (1, 0, 0)


async def raw(url: str, data: bytes) -> bytes:
    """Send bytes on a connection of their own; all that comes back."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(data)
    await writer.drain()
    writer.write_eof()
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_a_flood_of_what_is_no_request_does_not_flood_the_log(database_url: str, tmp_path: Path) -> None:
    floods = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nbroken\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: \x00\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nLong: " + b"x" * 20_000 + b"\r\n\r\n",
    ]
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        before = len(service.log)
        for _ in range(40):
            for answer in await asyncio.gather(*(raw(service.url, data) for data in floods)):
                assert answer == b"" or answer.startswith(b"HTTP/1.")
                assert b" 400 " in answer.split(b"\r\n")[0] or not answer
                assert b"Traceback" not in answer
                assert b".py" not in answer
        assert len(service.log) - before < 20, service.log[before:]
        assert "Traceback" not in "".join(service.log)


def bomb() -> bytes:
    """A request whose body, 600 KiB of gzip, inflates to 600 MB."""
    packer = zlib.compressobj(wbits=31)
    body = b"".join(packer.compress(bytes(10**6)) for _ in range(600)) + packer.flush()
    head = b"POST /api/balance/update HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def test_nothing_is_inflated(database_url: str, tmp_path: Path) -> None:
    """Inflating takes the service's time: a second and more for five of these bodies."""
    data = bomb()
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        process = psutil.Process(service.process.pid)
        before = process.cpu_times().user
        for answer in await asyncio.gather(*(raw(service.url, data) for _ in range(5))):
            assert answer.startswith(b"HTTP/1.1 415 "), answer
        assert process.cpu_times().user - before < 0.5


async def test_an_encoded_body_is_refused_before_it_arrives_and_leaves_its_connection_usable(
    database_url: str, tmp_path: Path
) -> None:
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        address = urlsplit(service.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(b"POST /no HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 415 ")
            writer.write(b"junkGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_fault_is_answered_without_its_cause(
    client: Client, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE users RENAME COLUMN balance TO hidden")
    with caplog.at_level(logging.ERROR):
        for answer in (
            await client.get("/api/users/1"),
            await client.post("/api/balance/update", json={"userId": 1, "amount": 1}),
        ):
            assert (answer.status, await answer.text()) == (500, '{"error":"Internal server error"}')
    assert "hidden" in caplog.text or "balance" in caplog.text


@pytest.mark.over_both_statements
async def test_the_cause_of_a_fault_is_found_by_the_id_of_its_request(client: Client, database_url: str) -> None:
    """The database's own words, on a line with the id of the request that asked for the change that fails."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    with Database(database_url) as database:
        database.open({1: 10, 2: 10})
        database.fail("NEW.reference = 'poison'", "P0001")
        logging.getLogger("atomic_balance").addHandler(handler)
        try:
            healthy, poison = {"userId": 1, "amount": -1}, {"userId": 2, "amount": -1, "reference": "poison"}
            alone, one_of_many, _ = await asyncio.gather(
                client.post("/api/balance/update", json=poison, headers={"X-Request-ID": "alone"}),
                client.post(
                    "/api/balance/updates",
                    json={"updates": [healthy, poison, healthy]},
                    headers={"X-Request-ID": "one-of-many"},
                ),
                client.post("/api/balance/update", json=healthy, headers={"X-Request-ID": "healthy"}),
            )
        finally:
            logging.getLogger("atomic_balance").removeHandler(handler)
    assert alone.status == 500
    assert [result["status"] for result in (await one_of_many.json())["results"]] == [200, 500, 200]
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    errors = [line for line in lines if line["level"] == "error"]
    assert {line.get("request_id") for line in errors} == {"alone", "one-of-many"}
    for request_id, what in (
        ("alone", "a change of user 2: "),
        ("one-of-many", "1 of 3 changes, the first updates[1] "),
    ):
        found = [line["message"] for line in errors if line["request_id"] == request_id]
        assert any(message.startswith(what) for message in found)
        assert any("on purpose" in message for message in found)


async def test_the_service_needs_no_more_than_these_grants(
    database_url: str, aiohttp_client: AiohttpClient, settings: Settings
) -> None:
    """The GRANTs of README.md, word for word."""
    readme = (ROOT / "README.md").read_text()
    grants = [line for line in readme.splitlines() if line.startswith("GRANT ")]
    assert len(grants) == 5
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE atomic_balance LOGIN")
        try:
            for grant in grants:
                connection.execute(grant.encode())
            client = await aiohttp_client(
                make_app(replace(settings, database_url=database_url.replace("postgres@", "atomic_balance@")))
            )
            assert (await client.get("/readyz")).status == 200
            assert (await client.put("/api/users/1", json={"balance": 5})).status == 201
            headers = {"Idempotency-Key": "k"}
            for amount, status in ((-2, 200), (-2, 200), (-200, 422)):
                answer = await client.post("/api/balance/update", json={"userId": 1, "amount": amount}, headers=headers)
                assert answer.status == status
            refused = {"userId": 1, "amount": -200}
            answer = await client.post("/api/balance/update", json=refused, headers={"Idempotency-Key": "r"})
            assert answer.status == 400
            assert (await client.patch("/api/users/1", json={"minimumBalance": -1})).status == 200
            assert (await client.get("/api/users/1/changes")).status == 200
            assert (await client.get("/api/changes")).status == 200
            hold = {"amount": 1, "expiresInSeconds": 1}
            for hold_id in ("captured", "expired"):
                assert (await client.put(f"/api/users/1/holds/{hold_id}", json=hold)).status == 201
            assert (await client.post("/api/users/1/holds/captured/capture")).status == 200
            async with asyncio.timeout(10):
                while (await (await client.get("/api/users/1")).json())["held"]:  # noqa: ASYNC110 - it is asked of a service
                    await asyncio.sleep(0.05)
            await client.close()
        finally:
            connection.execute("DROP OWNED BY atomic_balance")
            connection.execute("DROP ROLE atomic_balance")


async def test_no_secret_in_the_log(database_url: str, tmp_path: Path) -> None:
    url = database_url.replace("postgres@", "postgres:very-secret@")
    environment = {"DATABASE_URL": url, "API_TOKEN": "hush-hush", "LOG_LEVEL": "debug"}
    async with running_service(environment, tmp_path) as service:
        await raw(service.url, b"GET /api/users/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hush-hush\r\n\r\n")
        await raw(service.url, b"GET /\x00 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hush-hush\r\n\r\n")
    assert "secret" not in "".join(service.log)
    assert "hush" not in "".join(service.log)
