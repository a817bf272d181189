"""Grafana can import the dashboard, and each panel asks for metrics that exist, in a query that Prometheus accepts."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec import json

from tests.client import Client
from tests.processes import ROOT, run

DASHBOARD: dict[str, Any] = json.decode((ROOT / "docs" / "operations" / "dashboard.json").read_bytes())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def test_grafana_finds_what_it_needs() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["uid"]
    assert DASHBOARD["title"]
    assert "id" not in DASHBOARD  # which would be that of another dashboard, where it is imported
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) > 0
    for panel in PANELS:
        assert panel["title"]
        assert panel["datasource"] == DATA_SOURCE
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names) > 0
        for target in panel["targets"]:
            assert target["datasource"] == DATA_SOURCE
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*variables, "__rate_interval"}
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS}
    assert len(places) == len(PANELS)


async def test_the_panels_ask_for_metrics_and_labels_that_exist(client: Client) -> None:
    text = await (await client.get("/metrics")).text()
    names = set(re.findall(r"^([a-z_]+)[{ ]", text, re.MULTILINE))
    labels = {"instance", *re.findall(r'[{,]([a-z]+)="', text)}
    others = [variable["definition"] for variable in DASHBOARD["templating"]["list"] if "definition" in variable]
    asked = set(re.findall(r"\b(?:atomic_balance|process)_[a-z_]+", " ".join(QUERIES + others)))
    assert asked <= names
    assert {name for name in names if name.startswith("atomic_balance_") and not name.endswith("_created")} - asked <= {
        *(
            f"atomic_balance_{name}_duration_seconds_{part}"
            for name in ("change", "statement")
            for part in ("count", "sum")
        ),
        "atomic_balance_build_info",
    }
    grouped = [label for by in re.findall(r"by \(([^)]*)\)", " ".join(QUERIES)) for label in by.split(", ")]
    shown = re.findall(
        r"{{(\w+)}}", " ".join(target["legendFormat"] for panel in PANELS for target in panel["targets"])
    )
    assert {*grouped, *shown, *re.findall(r'(\w+)(?:=|!=|=~|!~)"', " ".join(QUERIES))} <= labels


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)")
async def test_prometheus_accepts_the_queries(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "5m") for query in QUERIES]
    rules = [{"record": f"query:number{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_bytes(json.encode({"groups": [{"name": "dashboard", "rules": rules}]}))  # YAML too
    status, output = await run("promtool", "check", "rules", "rules.yml", directory=tmp_path)
    assert (status, f"SUCCESS: {len(QUERIES)} rules found" in output) == (0, True), output
