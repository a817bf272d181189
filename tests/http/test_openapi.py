"""The OpenAPI document is complete, and the service keeps to it."""

import re
import sys
from pathlib import Path

import pytest

from atomic_balance.http.app import make_app
from atomic_balance.settings import Settings
from tests.client import Client
from tests.processes import ROOT, run, running_service


async def test_every_route_is_documented(client: Client, database_url: str) -> None:
    async with client.get("/openapi.json") as answer:
        document = await answer.json()
    documented = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    app = make_app(Settings(database_url=database_url))
    served = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert documented == served
    update = document["paths"]["/api/balance/update"]["post"]
    assert set(update["responses"]) == {
        str(status) for status in (200, 400, 401, 403, 404, 408, 413, 415, 421, 422, 500, 503, 504)
    }
    assert "Retry-After" in update["responses"]["503"]["headers"]
    assert [parameter["name"] for parameter in update["parameters"]] == ["Idempotency-Key"]


async def test_the_document_says_which_token_each_method_takes(client: Client) -> None:
    async with client.get("/openapi.json") as answer:
        document = await answer.json()
    assert set(document["components"]["securitySchemes"]) == {"API_TOKEN", "READ_TOKEN"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            taken = {name for option in operation["security"] for name in option}
            if path in ("/healthz", "/readyz"):
                assert taken == set()
            else:
                assert taken == ({"API_TOKEN", "READ_TOKEN"} if method == "get" else {"API_TOKEN"})


@pytest.mark.slow
async def test_the_service_keeps_to_its_document(database_url: str, tmp_path: Path) -> None:
    schemathesis = str(Path(sys.executable).with_name("schemathesis"))
    async with running_service({"DATABASE_URL": database_url}, tmp_path) as service:
        status, output = await run(
            *(schemathesis, "--config-file", str(ROOT / "tests" / "schemathesis.toml")),
            *("run", f"{service.url}/openapi.json", "--checks", "all", "--max-examples", "50"),
            *("--exclude-path", "/live/events"),  # it never ends
            *("--generation-deterministic", "--no-color"),
            directory=tmp_path,
        )
    assert status == 0, output


async def test_the_page_reaches_no_other_host(client: Client) -> None:
    async with client.get("/docs") as answer:
        page = await answer.text()
        assert answer.content_type == "text/html"
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "http://" not in page
    assert "https://" not in page
    assert "//" not in re.sub(r"^ *// .*$", "", page, flags=re.MULTILINE)
