"""Prometheus accepts the metrics and the alert rules, and each rule asks for metrics that exist."""

import asyncio
import os
import re
import shutil

import pytest

from tests.client import Client, opened, update
from tests.processes import ROOT, run

RULES = ROOT / "docs" / "operations" / "alerts.yml"

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None and os.environ.get("CI") != "true",
    reason="promtool is not installed (apt-get install prometheus)",
)


async def test_promtool_accepts_the_rules() -> None:
    status, output = await run("promtool", "check", "rules", str(RULES), directory=ROOT)
    assert (status, "SUCCESS: 9 rules found" in output) == (0, True), output


async def test_promtool_accepts_the_metrics(client: Client) -> None:
    await opened(client, 1)
    for amount in (1, -5):
        await update(client, amount)
    text = await (await client.get("/metrics")).read()
    promtool = await asyncio.create_subprocess_exec(
        *("promtool", "check", "metrics"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=-2
    )
    output, _ = await promtool.communicate(text)
    assert (promtool.returncode, output.decode()) == (0, "")


async def test_the_rules_ask_for_metrics_that_exist(client: Client) -> None:
    text = await (await client.get("/metrics")).text()
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    asked = set(re.findall(r"\batomic_balance_[a-z_]+", RULES.read_text()))
    assert {name.removesuffix("_bucket") for name in asked} <= names
    documented = re.findall(r"^\| `(AtomicBalance\w+)` ", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert documented == re.findall(r"alert: (\w+)", RULES.read_text())
