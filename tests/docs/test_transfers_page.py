"""docs/transfers.md: its marketplace works as pasted, and its table has every answer."""

import re
from pathlib import Path

from atomic_balance.http.errors import PROBLEMS
from atomic_balance.postgres.verify import verify
from tests.database import Database
from tests.docs.pasting import blocks, commands_and_answers, proxy_before, run_and_compare
from tests.fault_proxy import Link
from tests.processes import ROOT, running_service

PAGE = (ROOT / "docs" / "transfers.md").read_text()


async def test_the_marketplace_works_as_pasted_and_prints_what_the_page_says(
    database: Database, tmp_path: Path
) -> None:
    """Only the port is another one; two answers are lost, and asked for again."""
    async with running_service({"DATABASE_URL": database.url}, tmp_path) as service, proxy_before(service) as proxy:
        requests = (b"POST /api/balance/transfer HTTP", b"order-10/capture")
        struck = [proxy.strike(words, Link.cut_at_answer) for words in requests]
        await run_and_compare(commands_and_answers(blocks(PAGE)), proxy.port, tmp_path)
        assert all(one.done() for one in struck)
    assert database.execute("SELECT sum(balance), sum(held) FROM users") == [(10_000, 0)]
    assert verify(database.url).differences == []


def test_the_table_has_every_answer_to_a_transfer() -> None:
    table = PAGE[PAGE.index("| request |") : PAGE.index("\n\n", PAGE.index("| request |"))]
    texts = {PROBLEMS[code].text for code in ("insufficient_funds", "balance_limit_exceeded", "user_not_found")}
    assert texts <= set(re.findall("`(.*?)`", table))
    assert {"200", "400", "404", "422"} <= set(re.findall(r"\b\d{3}\b", table))
