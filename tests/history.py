"""Are the answers of concurrent requests those of some order in which they were done one after the other?

The journal says in which order an account's changes were applied. That order must fit real time: a change that was
answered before another was asked for has the smaller version. And each refusal must be justified by a balance that the
account can have had between the request and its answer. Together that is linearizability (Herlihy and Wing, 1990) of
each account, checked in one pass because the order need not be guessed.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
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
