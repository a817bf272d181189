"""docs/holds.md: its checkout works as pasted, and its table has every answer."""

import re
from pathlib import Path

from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.http.errors import PROBLEMS
from atomic_balance.postgres.verify import verify
from tests.database import Database
from tests.docs.pasting import blocks, commands_and_answers, proxy_before, run_and_compare
from tests.fault_proxy import Link
from tests.processes import ROOT, running_service

PAGE = (ROOT / "docs" / "holds.md").read_text()


async def test_the_checkout_works_as_pasted_and_prints_what_the_page_says(database: Database, tmp_path: Path) -> None:
    """Only the port is another one; three answers are lost, and asked for again."""
    async with running_service({"DATABASE_URL": database.url}, tmp_path) as service, proxy_before(service) as proxy:
        requests = (b"PUT /api/users/4711/holds/order-1", b"order-1/capture", b"order-2/release")
        struck = [proxy.strike(words, Link.cut_at_answer) for words in requests]
        await run_and_compare(commands_and_answers(blocks(PAGE)), proxy.port, tmp_path)
        assert all(one.done() for one in struck)
    changes = database.execute("SELECT amount, hold_amount FROM balance_changes WHERE user_id = 4711 ORDER BY version")
    assert [change for change in changes if change[1] is not None] == [(0, 500), (-450, -500), (0, 700), (0, -700)]
    assert verify(database.url).differences == []


def test_the_table_has_every_answer_to_a_hold() -> None:
    table = PAGE[PAGE.index("| request |") : PAGE.index("\n\n", PAGE.index("| request |"))]
    endpoints = [endpoint for endpoint in ENDPOINTS if "/holds" in endpoint.path]
    statuses = {str(status) for endpoint in endpoints for status in endpoint.statuses if status < 500}
    assert statuses <= set(re.findall(r"\b\d{3}\b", table))
    texts = {PROBLEMS[code].text for endpoint in endpoints for code in endpoint.errors if code.startswith("hold_")}
    assert len(texts) == 5
    assert texts <= set(re.findall("`(.*?)`", table))
