"""Transfers: from a request to its answer. A transfer is a change of its payer like any other."""

from collections.abc import Iterable, Mapping, Sequence

import msgspec
from aiohttp import web

from atomic_balance.changes import Applied, Change, Credit, NoSuchPayee, Outcome, Refused, Undecided, transfer
from atomic_balance.http.app_keys import GROUP_COMMIT
from atomic_balance.http.errors import PROBLEMS
from atomic_balance.http.handlers import answer_with, answer_without, marked, submit_all
from atomic_balance.http.messages import (
    PaidBalance,
    Payee,
    Transfer,
    TransferredBalances,
    TransferResult,
    TransferResults,
    Transfers,
)
from atomic_balance.http.parsing import parse_body, parse_idempotency_key

_decode_transfer = msgspec.json.Decoder(Transfer)
_decode_transfers = msgspec.json.Decoder(Transfers)


async def transfer_balance(request: web.Request) -> web.Response:
    """POST /api/balance/transfer: move money from one user to one or many."""
    asked = await parse_body(request, _decode_transfer)
    change = transfer(asked.from_user_id, credits_of(asked.to), parse_idempotency_key(request), asked.reference)
    outcome = await request.app[GROUP_COMMIT].submit(change)
    if not isinstance(outcome, Applied):
        return answer_without(request, change, outcome)
    paid = TransferredBalances(asked.from_user_id, outcome.balance, paid_balances(asked.to, outcome.payee_balances))
    return marked(answer_with(paid), outcome.replayed)


async def transfer_balances(request: web.Request) -> web.Response:
    """POST /api/balance/transfers: many transfers, each on its own."""
    asked = (await parse_body(request, _decode_transfers)).transfers
    changes = [transfer(one.from_user_id, credits_of(one.to), one.idempotency_key, one.reference) for one in asked]
    outcomes = await submit_all(request, "transfers", changes)
    results = [_result(one.to, change, outcome) for one, change, outcome in zip(asked, changes, outcomes, strict=True)]
    return answer_with(TransferResults(results))


def credits_of(to: Iterable[Payee]) -> Iterable[Credit]:
    """What the payees of a request are credited with."""
    return (Credit(payee.user_id, payee.amount) for payee in to)


def paid_balances(to: Sequence[Payee], balances: Mapping[int, int] | None) -> list[PaidBalance]:
    """The payees' balances, in the order of the request."""
    return [PaidBalance(payee.user_id, (balances or {})[payee.user_id]) for payee in to]


def _result(to: Sequence[Payee], change: Change, outcome: Outcome) -> TransferResult:
    if isinstance(outcome, Applied):
        paid = paid_balances(to, outcome.payee_balances)
        return TransferResult(200, change.user_id, outcome.balance, paid, replayed=outcome.replayed)
    if isinstance(outcome, Refused):
        problem = PROBLEMS[outcome.reason]
        return TransferResult(problem.status, error=problem.text, replayed=outcome.replayed)
    if isinstance(outcome, NoSuchPayee):
        problem = PROBLEMS[Undecided.NO_SUCH_USER]
        return TransferResult(problem.status, error=problem.text, user_id=outcome.user_id)
    problem = PROBLEMS[outcome]
    return TransferResult(problem.status, error=problem.text)
