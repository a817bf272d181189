"""What is held against the journal at the end, and what is counted of it."""

from collections import Counter
from collections.abc import Iterable

from atomic_balance.postgres.verify import verify
from tests.soak.accounts import judge_openings
from tests.soak.asking import Reply
from tests.soak.feed import judge_feed
from tests.soak.holds import judge_holds
from tests.soak.imports import judge_imports
from tests.soak.journal import read_journal
from tests.soak.load import Load
from tests.soak.past import judge_reads
from tests.soak.transfers import judge_transfers
from tests.soak.updates import judge_updates


def judge(load: Load, url: str) -> tuple[str, list[str]]:
    """Hold all that was answered against the journal, and that against the balances.

    Gives a summary, and what is wrong, a line each.
    """
    journal = read_journal(url)
    wrong = [
        *judge_openings(load.accounts.replies, journal),
        *judge_updates(load.updates.asked, journal),
        *judge_transfers(load.transfers.asked, journal),
        *judge_holds(load.holds.asked, journal),
        *judge_reads(load.reads.asked, journal),
        *judge_imports(load.imports.asked, journal),
        *judge_feed([reader.seen for reader in load.feed.readers], journal),
        *(line for reader in load.feed.readers for line in reader.wrong),
    ]
    audit = verify(url)
    wrong += audit.differences
    if audit.money.made:
        wrong.append(f"money is not what it was: {audit.money}")
    updates = [reply for one in load.updates.asked for reply in one.replies]
    transfers = [reply for one in load.transfers.asked for reply in one.replies]
    placings = [reply for one in load.holds.asked for reply in one.placings]
    endings = [ending for one in load.holds.asked for ending in one.endings]
    lines = {
        "openings": _told(reply for _, reply in load.accounts.replies),
        f"updates, {len(load.updates.asked):,}": _told(updates),
        f"transfers, {len(load.transfers.asked):,}": _told(transfers),
        f"holds, {len(load.holds.asked):,}": _told(placings),
        "captures": _told(ending.reply for ending in endings if ending.how == "capture" and not ending.payees),
        "captures to others": _told(ending.reply for ending in endings if ending.payees),
        "releases": _told(ending.reply for ending in endings if ending.how == "release"),
        "reads": _told(one.reply for one in load.reads.asked if one.at is None),
        "reads of the past": _told(one.reply for one in load.reads.asked if one.at),
        f"imports of {len(load.imports.asked):,} files": counted(load.imports.told),
        "pages of the feed": counted(load.feed.told),
        "audit": f"{audit.changes:,} changes of {audit.accounts:,} accounts, which have {audit.money.balances:,}",
    }
    return "\n".join(f"{name}: {text}" for name, text in lines.items()), wrong


def _told(replies: Iterable[Reply]) -> str:
    """How often each answer was given (0: none came), and how many were repetitions."""
    counts: Counter[str] = Counter()
    for reply in replies:
        counts[reply.told()] += 1
        counts["replayed"] += reply.replayed
    return counted(counts)


def counted(counts: Counter[str]) -> str:
    """How often there was each, in one line."""
    return ", ".join(f"{count:,} x {told}" for told, count in sorted((+counts).items())) or "none"
