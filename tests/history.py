"""Are the answers of concurrent requests those of some order in which they were done one after the other?

The journal says in which order an account's changes were applied. That order must fit real time: a change that was
answered before another was asked for has the smaller version. And each refusal must be justified by a balance that the
account can have had between the request and its answer. Together that is linearizability (Herlihy and Wing, 1990) of
each account, checked in one pass because the order need not be guessed.

A transfer is one operation of several accounts. So their orders must also fit each other (nothing comes before itself)
and real time across all of them, and whoever reads several accounts at once sees all of a transfer or nothing of it.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

from atomic_balance.changes import BALANCE_LIMIT, Change
from atomic_balance.commit.planning import refusal


class Operation(NamedTuple):
    """One request and its answer: when it was sent and answered, and the new balance, or None if it was refused.

    `replayed`: it was decided by an earlier request with its key; `name` is the key, or else its own reference.
    `hold_amount`: what it adds to what is held. `told`: whether the answer says the new balance.
    """

    name: str
    amount: int
    asked: float
    answered: float
    new_balance: int | None
    replayed: bool = False
    hold_amount: int = 0
    told: bool = True


class Applied(NamedTuple):
    """A row of the journal; they come in order of their versions, from 1."""

    name: str
    amount: int
    balance: int
    hold_amount: int = 0


class Transfer(NamedTuple):
    """A transfer and its answer: the balances that it told, of payer and payees, or None if it was refused.

    `name` belongs to no other operation of any account. `payees`: amounts by user id. The rest as in `Operation`.
    """

    name: str
    payer: int
    payees: Mapping[int, int]
    asked: float
    answered: float
    balances: Mapping[int, int] | None
    replayed: bool = False

    @property
    def legs(self) -> dict[int, int]:
        """What it adds to each account."""
        return {self.payer: -sum(self.payees.values()), **self.payees}


class Snapshot(NamedTuple):
    """Some accounts, read at once: (version, balance) by user id; when that was asked for and answered."""

    asked: float
    answered: float
    accounts: Mapping[int, tuple[int, int]]


def contradictions_between(
    updates: Mapping[int, Sequence[Operation]],
    transfers: Sequence[Transfer],
    snapshots: Iterable[Snapshot],
    journals: Mapping[int, Sequence[Applied]],
    openings: Mapping[int, int],
) -> list[str]:
    """Why the history of several accounts is not linearizable, a line each; nothing if it is.

    `updates`: by user id, what concerns one account. `journals`, `openings`: by user id, of all accounts. A leg of a
    transfer has the transfer's name in each journal.
    """
    operations = {user_id: list(updates.get(user_id, ())) for user_id in journals}
    legs: dict[str, dict[int, int]] = {}
    for user_id, own in operations.items():
        legs |= {one.name: {user_id: one.amount} for one in own if one.new_balance is not None}
    for one in transfers:
        for user_id, amount in one.legs.items() if one.balances else [(one.payer, one.legs[one.payer])]:
            told = one.balances[user_id] if one.balances else None
            operations[user_id].append(Operation(one.name, amount, one.asked, one.answered, told, one.replayed))
        if one.balances:
            legs[one.name] = one.legs
    found = [
        f"user {user_id}: {line}"
        for user_id, own in operations.items()
        for line in contradictions(own, journals[user_id], openings[user_id])
    ]
    found += _wrong_legs(legs, journals)
    asked: defaultdict[str, float] = defaultdict(lambda: math.inf)
    answered: defaultdict[str, float] = defaultdict(lambda: math.inf)
    for part in chain.from_iterable(operations.values()):
        asked[part.name] = min(asked[part.name], part.asked)
        if part.new_balance is not None:
            answered[part.name] = min(answered[part.name], part.answered)
    found += _out_of_order_between(journals, asked, answered)
    for snapshot in snapshots:
        found += _torn(snapshot, legs, journals, openings, asked, answered)
    return found


def _wrong_legs(legs: Mapping[str, Mapping[int, int]], journals: Mapping[int, Sequence[Applied]]) -> list[str]:
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for user_id, journal in journals.items():
        for row in journal:
            found[row.name][user_id] = row.amount
    return [
        f"{name} moves {legs.get(name, 'nothing')}, the journal says {found.get(name, 'nothing')}"
        for name in {*legs, *found}
        if legs.get(name) != found.get(name)
    ]


def _out_of_order_between(
    journals: Mapping[int, Sequence[Applied]], asked: Mapping[str, float], answered: Mapping[str, float]
) -> Iterator[str]:
    """Operations that come before themselves, or were answered before one that comes before them was asked for."""
    before: dict[str, set[str]] = {row.name: set() for journal in journals.values() for row in journal}
    for journal in journals.values():
        for one, following in pairwise(journal):
            before[following.name].add(one.name)
    latest_asked: dict[str, float] = {}
    try:
        for name in TopologicalSorter(before).static_order():
            latest = max((latest_asked[one] for one in before[name]), default=0.0)
            if answered[name] < latest:
                yield f"{name} was answered before one that comes before it, in any account, was asked for"
            latest_asked[name] = max(latest, asked[name])
    except CycleError as error:
        yield f"the orders of the accounts contradict each other: {' before '.join(error.args[1])}"


def _torn(
    snapshot: Snapshot,
    legs: Mapping[str, Mapping[int, int]],
    journals: Mapping[int, Sequence[Applied]],
    openings: Mapping[int, int],
    asked: Mapping[str, float],
    answered: Mapping[str, float],
) -> Iterator[str]:
    """What is wrong with accounts that were read at once."""
    seen: dict[str, set[bool]] = defaultdict(set)
    total = 0
    for user_id, (version, balance) in snapshot.accounts.items():
        journal = journals[user_id]
        balances = [openings[user_id], *(row.balance for row in journal)]
        if balances[version : version + 1] != [balance]:
            yield f"user {user_id}: {balance} was read at version {version}, the journal knows otherwise"
        for number, row in enumerate(journal, 1):
            seen[row.name].add(number <= version)
        total += balance
    for name, whether in seen.items():
        if len(whether) > 1:
            yield f"a part of {name} was read"
        if False in whether and answered[name] < snapshot.asked:
            yield f"{name} was answered before a read that has not seen it"
        if True in whether and asked[name] > snapshot.answered:
            yield f"{name} was read before it was asked for"
    if snapshot.accounts.keys() == journals.keys():
        moved = sum(sum(legs.get(name, {}).values()) for name, whether in seen.items() if True in whether)
        if total != sum(openings.values()) + moved:
            yield f"the accounts have {total} together, not {sum(openings.values()) + moved}"


def contradictions(
    operations: Sequence[Operation], journal: Sequence[Applied], opening_balance: int, minimum_balance: int = 0
) -> list[str]:
    """Why the history of one account is not linearizable, a line each; nothing if it is."""
    first_asked = {
        name: min(one.asked for one in operations if one.name == name) for name in {one.name for one in operations}
    }
    found: list[str] = []
    version_of = {row.name: version for version, row in enumerate(journal, 1)}
    by_version: dict[int, list[Operation]] = {}
    for one in operations:
        version = version_of.get(one.name)
        if one.new_balance is None:
            if version is not None:
                found.append(f"{one.name} was refused and is in the journal")
        elif version is None or (one.told and journal[version - 1].balance != one.new_balance):
            found.append(f"{one.name} was answered {one.new_balance}, the journal knows otherwise")
        else:
            by_version.setdefault(version, []).append(one)
    balances = [opening_balance, *(row.balance for row in journal)]
    helds = [0, *accumulate(row.hold_amount for row in journal)]
    available = [balance - held - minimum_balance for balance, held in zip(balances, helds, strict=True)]
    found += _wrong_sums(journal, opening_balance)
    found += (f"version {version}: {left} is available" for version, left in enumerate(available) if left < 0)
    found += (f"version {version}: {held} is held" for version, held in enumerate(helds) if held < 0)
    found += _out_of_order(by_version, first_asked)
    found += _unjustified(operations, by_version, first_asked, balances, available)
    return found


def _wrong_sums(journal: Sequence[Applied], balance: int) -> list[str]:
    found = []
    for version, row in enumerate(journal, 1):
        balance += row.amount
        if row.balance != balance:
            found.append(f"version {version}: {balance} is expected, not {row.balance}")
    return found


def _out_of_order(by_version: Mapping[int, list[Operation]], first_asked: Mapping[str, float]) -> list[str]:
    """Versions whose change was answered before one with a smaller version was asked for."""
    found = []
    latest_asked = 0.0
    for version in sorted(by_version):
        operations = by_version[version]
        if min(one.answered for one in operations) < latest_asked:
            found.append(f"version {version} was answered before one with a smaller version was asked for")
        latest_asked = max(latest_asked, first_asked[operations[0].name])
    return found


def _unjustified(
    operations: Sequence[Operation],
    by_version: Mapping[int, list[Operation]],
    first_asked: Mapping[str, float],
    balances: Sequence[int],
    available: Sequence[int],
) -> list[str]:
    """Refusals that no balance of their time justifies.

    A version was surely reached when the first answer of it, or of a later one, had come; it was surely not before its
    change had been asked for, nor any before it.
    """
    versions = sorted(by_version)
    earliest = [max(first_asked[by_version[v][0].name] for v in versions[: i + 1]) for i in range(len(versions))]
    latest = [min(one.answered for v in versions[i:] for one in by_version[v]) for i in range(len(versions))]
    found = []
    for one in operations:
        if one.new_balance is not None or one.replayed:
            continue
        surely = bisect_left(latest, one.asked)
        perhaps = bisect_right(earliest, one.answered)
        low = versions[surely - 1] if surely else 0
        high = versions[perhaps] - 1 if perhaps < len(versions) else len(balances) - 1
        if not any(
            refusal(Change(1, one.amount, hold_amount=one.hold_amount), available[at], BALANCE_LIMIT - balances[at])
            for at in range(low, high + 1)
        ):
            found.append(f"the refusal of {one.name} is not justified by a balance between versions {low} and {high}")
    return found
