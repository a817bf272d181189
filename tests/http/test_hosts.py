"""DNS rebinding: a page whose name was made to resolve to this machine is not answered, unless there is a token."""

import pytest
from msgspec.structs import replace
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.http.hosts import host_check
from atomic_balance.settings import Settings
from tests.client import Client

LOOPBACK = ["localhost", "LocalHost:3000", "localhost.", "api.localhost:1", "127.0.0.1", "127.8.9.10:80", "[::1]:3000"]
STRANGERS = [
    "evil.example",
    "evil.example:3000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil-localhost",
    "evil.example@localhost",
    "localhost:80:evil.example",
    "[evil.example]",
    "[::1",
    "",
]
OTHER_ADDRESSES = ["192.168.1.1", "[2001:db8::1]:3000"]


@pytest.mark.parametrize("host", LOOPBACK)
async def test_a_loopback_name_is_answered(client: Client, host: str) -> None:
    async with client.put("/api/users/1", json={"balance": 1}, headers={"Host": host}) as answer:
        assert answer.status == 201


@pytest.mark.parametrize("host", STRANGERS + OTHER_ADDRESSES)
async def test_a_page_whose_name_leads_here_changes_nothing_and_learns_nothing(client: Client, host: str) -> None:
    async with client.put("/api/users/1", json={"balance": 1}) as answer:
        assert answer.status == 201
    text = '{"error":"Host: expected a name of this service (the setting ALLOWED_HOSTS adds names)"}'
    update = {"userId": 1, "amount": 1}
    async with client.post("/api/balance/update", json=update, headers={"Host": host}) as answer:
        assert (answer.status, await answer.text()) == (421, text)
    async with client.get("/nothing", headers={"Host": host}) as answer:
        assert answer.status == 421
    async with client.get("/api/users/1") as answer:
        assert (await answer.json())["balance"] == 1


async def test_health_alone_is_answered_under_any_name(client: Client) -> None:
    for endpoint in ENDPOINTS:
        path = endpoint.path.format(userId=1, key="k", holdId="h")
        async with client.request(endpoint.method, path, json={}, headers={"Host": "evil.example"}) as answer:
            assert answer.status == (200 if path in ("/healthz", "/readyz") else 421)


async def test_with_a_token_any_name_is_answered(aiohttp_client: AiohttpClient, settings: Settings) -> None:
    client = await aiohttp_client(make_app(replace(settings, api_token="secret")))
    headers = {"Host": "balance.example.org", "Authorization": "Bearer secret"}
    async with client.get("/openapi.json", headers=headers) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    ("settings", "answered", "refused"),
    [
        (Settings(), LOOPBACK, STRANGERS + OTHER_ADDRESSES),
        (Settings(host="::1"), [*LOOPBACK, "[0:0::1]"], STRANGERS + OTHER_ADDRESSES),
        (Settings(host="192.168.1.1"), [*LOOPBACK, "192.168.1.1:80"], ["192.168.1.2", *STRANGERS]),
        (Settings(host="2001:DB8:0::1"), [*LOOPBACK, "[2001:db8::1]:80"], ["[2001:db8::2]", *STRANGERS]),
        (Settings(host="0.0.0.0"), LOOPBACK + OTHER_ADDRESSES, STRANGERS),
        (Settings(host="::"), LOOPBACK + OTHER_ADDRESSES, STRANGERS),
        (Settings(host="Balance.internal"), [*LOOPBACK, *OTHER_ADDRESSES, "balance.INTERNAL:3000"], STRANGERS),
        (
            Settings(allowed_hosts="balance.internal , Example.org.,192.168.1.1,[2001:db8::1]"),
            [*LOOPBACK, *OTHER_ADDRESSES, "balance.internal:3000", "example.org"],
            ["www.example.org", "192.168.1.2", *STRANGERS],
        ),
    ],
)
def test_which_hosts_are_answered(settings: Settings, answered: list[str], refused: list[str]) -> None:
    is_answered = host_check(settings)
    assert [host for host in answered if not is_answered(host)] == []
    assert [host for host in refused if is_answered(host)] == []
