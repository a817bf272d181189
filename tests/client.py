"""A caller over HTTP: of a service in this process, or of services that are processes of their own.

For the latter `url` says which one is asked.
"""

import asyncio
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request

Client = TestClient[Request, Application]
Caller = Client | aiohttp.ClientSession

UPDATE = "/api/balance/update"
TRANSFER = "/api/balance/transfer"
APPLIED = (200, "applied")
REFUSED = (400, '{"error":"Insufficient funds"}')


class Told(NamedTuple):
    """An answer: its status, its body, and whether it repeats an earlier one."""

    status: int
    body: Any
    replayed: bool


def session(connections_max: int = 500) -> aiohttp.ClientSession:
    """A caller with so many connections at the most (0: as many as there are requests)."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections_max))


async def opened(client: Caller, balance: int = 10_000, user_id: int = 1, url: str = "") -> None:
    """Open an account."""
    async with client.put(f"{url}/api/users/{user_id}", json={"balance": balance}) as answer:
        assert answer.status == 201


async def balance(client: Caller, url: str = "") -> int:
    """What user 1 has."""
    async with client.get(f"{url}/api/users/1") as answer:
        return int((await answer.json())["balance"])


async def update(
    client: Caller, amount: int, user_id: int = 1, url: str = "", headers: Mapping[str, str] = {}, **more: Any
) -> tuple[int, str]:
    """Change a balance, with `more` members in the body; the status and the body of the answer."""
    body = {"userId": user_id, "amount": amount, **more}
    async with client.post(url + UPDATE, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


async def withdraw(client: Caller, url: str = "", key: str | None = None) -> tuple[int, str]:
    """Withdraw 2 from user 1: APPLIED, REFUSED, or the status and the body of another answer."""
    status, text = await update(client, -2, url=url, headers={"Idempotency-Key": key} if key else {})
    return APPLIED if status == 200 else (status, text)


async def persistently(client: Caller, urls: Sequence[str], key: str, again: Container[int] = ()) -> tuple[int, str]:
    """Withdraw with a key, and ask again, here and there, when a connection fails or the answer's status is in `again`.

    What a careful caller does.
    """
    for attempt in range(1000):
        try:
            answer = await withdraw(client, urls[attempt % len(urls)], key)
        except (aiohttp.ClientError, ConnectionError):
            pass
        else:
            if answer[0] not in again:
                return answer
        await asyncio.sleep(0.05)
    raise AssertionError(f"no outcome for {key}")


async def hold(client: Caller, hold_id: str, amount: int, user_id: int = 1, url: str = "", **more: Any) -> Told:
    """Set money aside, with `more` members in the body."""
    body = {"amount": amount, **more}
    async with client.put(f"{url}/api/users/{user_id}/holds/{hold_id}", json=body) as answer:
        return await told(answer)


async def settle(client: Caller, how: str, hold_id: str, user_id: int = 1, url: str = "", **body: Any) -> Told:
    """Capture or release a hold, as `how` says."""
    async with client.post(f"{url}/api/users/{user_id}/holds/{hold_id}/{how}", json=body) as answer:
        return await told(answer)


async def transfer(
    client: Caller, payer: int, payees: Mapping[int, int], url: str = "", key: str | None = None, **more: Any
) -> Told:
    """Move money from one user to others, with `more` members in the body; `payees`: amounts by user id."""
    to = [{"userId": user_id, "amount": amount} for user_id, amount in payees.items()]
    headers = {"Idempotency-Key": key} if key else {}
    async with client.post(url + TRANSFER, json={"fromUserId": payer, "to": to, **more}, headers=headers) as answer:
        return await told(answer)


async def told(answer: aiohttp.ClientResponse) -> Told:
    """What an answer says."""
    return Told(answer.status, await answer.json(), "Idempotent-Replayed" in answer.headers)
