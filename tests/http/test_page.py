"""The live page, in a real browser."""

import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import ANY

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from atomic_balance.http.endpoints import ENDPOINTS
from tests.client import session, update
from tests.database import Database
from tests.processes import Service, running_service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Chromium's own background traffic would look like the page's.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
SIZES = {"desktop": (1200, 1000), "phone": (360, 740)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("CI") != "true",
        reason="Chromium is not installed (apt-get install chromium)",
    ),
]


@pytest.fixture
async def service(database: Database, tmp_path: Path) -> AsyncIterator[Service]:
    database.open({1: 10})
    async with running_service({"DATABASE_URL": database.url, "DEMO": "true"}, tmp_path) as running:
        yield running


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        await running.close()


async def visited(browser: Browser, url: str, size: tuple[int, int]) -> tuple[Page, list[str]]:
    """The page, and what was wrong with it so far: console errors, and requests to another host."""
    page = await browser.new_page(viewport={"width": size[0], "height": size[1]})
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:")) else wrong.append(asked.url))
    await page.goto(url + "/")
    await expect(page.locator("#state")).to_have_text("live")
    return page, wrong


async def overflow(page: Page) -> int:
    """By how many pixels the page is wider than its window."""
    root = "document.documentElement"
    return int(await page.evaluate(f"{root}.scrollWidth - {root}.clientWidth"))


async def deposit(service: Service, count: int) -> None:
    async with session() as client:
        for _ in range(count):
            assert (await update(client, 1, url=service.url))[0] == 200


async def test_the_race_runs_to_its_verdict(browser: Browser, service: Service) -> None:
    page, wrong = await visited(browser, service.url, SIZES["desktop"])
    assert wrong == []
    await page.get_by_role("button", name="Run the race").focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#verdict")).to_contain_text("5,000 / 5,000 / 0 - exactly right", timeout=90_000)
    assert await page.locator("#race-progress").get_attribute("value") == "10000"
    await expect(page.locator("#changes tr")).to_have_count(201)
    assert len(await page.locator("#race-plot path").last.get_attribute("d") or "") > 1_000
    for width, height in SIZES.values():
        await page.set_viewport_size({"width": width, "height": height})
        assert await overflow(page) == 0
    assert wrong == []


async def test_the_ring_keeps_what_all_have_together(browser: Browser, service: Service) -> None:
    page, wrong = await visited(browser, service.url, SIZES["desktop"])
    await page.get_by_role("button", name="Run the ring").click()
    await expect(page.locator("#ring-verdict")).to_contain_text("100,000 in all - exactly right", timeout=90_000)
    paid, refused = re.findall("([0-9,]+) (?:paid|refused)", await page.locator("#ring-verdict").inner_text())
    assert int(paid.replace(",", "")) + int(refused.replace(",", "")) == 10_000
    assert await page.locator("#ring-progress").get_attribute("value") == "10000"
    line = await page.locator("#ring-plot path").last.get_attribute("d") or ""
    assert line.count("L") > 1
    assert len({point.split(" ")[1] for point in re.split("[ML]", line)[1:]}) == 1  # it is flat
    for width, height in SIZES.values():
        await page.set_viewport_size({"width": width, "height": height})
        assert await overflow(page) == 0
    assert wrong == []


@pytest.mark.parametrize(
    "environment",
    [{}, {"DEMO": "true", "API_TOKEN": "sesame", "READ_TOKEN": "look"}],
    ids=["not asked for", "a token to read"],
)
async def test_races_are_not_offered_everywhere(
    browser: Browser, database_url: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    async with running_service({"DATABASE_URL": database_url, **environment}, tmp_path) as service:
        page = await browser.new_page()
        await page.goto(service.url + "/")
        if environment:
            await page.get_by_label("this service wants a token").fill("look")
            await page.keyboard.press("Enter")
        await expect(page.locator("#state")).to_have_text("live")
        await expect(page.get_by_role("button", name="Show")).to_be_visible()
        for name in ("Run the race", "Run the ring"):
            await expect(page.get_by_role("button", name=name)).to_be_hidden()
        await expect(page.get_by_text("DEMO")).to_be_visible()
        assert await page.evaluate("ask('/live/total?first=1').then(answer => answer.status)") == 404


async def test_the_plots_move_under_load(browser: Browser, service: Service) -> None:
    page, wrong = await visited(browser, service.url, SIZES["desktop"])
    applied = page.locator("#plots section").first.locator("b").first
    await expect(applied).to_have_text("0", timeout=5_000)
    await deposit(service, 1)
    for plot in await page.locator("#plots svg").all():
        for _ in range(100):
            if "L" in (await plot.locator("path").nth(1).get_attribute("d") or ""):
                break
            await deposit(service, 50)  # a line needs load in two seconds, one after the other
        else:
            raise AssertionError(await plot.get_attribute("aria-label"))
    await expect(applied).not_to_have_text("0", timeout=5_000)
    assert wrong == []


async def test_an_account_is_shown_with_its_latest_changes(browser: Browser, service: Service) -> None:
    await deposit(service, 3)
    page, wrong = await visited(browser, service.url, SIZES["phone"])
    await page.get_by_label("user id").fill("1")
    await page.get_by_role("button", name="Show").click()
    await expect(page.locator("#balance")).to_have_text("13, available 13")
    await expect(page.locator("#details")).to_have_text("held 0, at least 0, version 3")
    await expect(page.locator("#holds")).to_be_hidden()
    await expect(page.locator("#changes tr")).to_have_count(5)
    rows = await page.locator("#changes tr").all_inner_texts()
    assert [row.split() for row in rows[1:]] == [
        ["3", "1", "13"],
        ["2", "1", "12"],
        ["1", "1", "11"],
        ["0", "10", "10", "opening"],
    ]
    assert wrong == []
    assert await overflow(page) == 0
    await page.get_by_label("user id").fill("2")
    await page.get_by_role("button", name="Show").click()
    await expect(page.locator("#balance")).to_have_text("User not found")


async def test_an_account_is_shown_with_what_is_held_and_its_open_holds(browser: Browser, service: Service) -> None:
    long = "x" * 255
    async with session() as client:
        holds = f"{service.url}/api/users/1/holds"
        for hold_id, body in (
            ("order-1", {"amount": 3, "reference": "order 1"}),
            ("order-2", {"amount": 2}),
            (long, {"amount": 1}),
        ):
            assert (await client.put(f"{holds}/{hold_id}", json=body)).status == 201
        assert (await client.post(f"{holds}/order-2/capture")).status == 200
        expires_at = (await (await client.get(f"{holds}/order-1")).json())["expiresAt"]
    page, wrong = await visited(browser, service.url, SIZES["phone"])
    await page.get_by_role("button", name="Show").click()
    await expect(page.locator("#balance")).to_have_text("8, available 4")
    await expect(page.locator("#details")).to_have_text("held 4, at least 0, version 4")
    until = await page.evaluate("text => new Date(text).toLocaleString('sv')", expires_at)
    rows = await page.get_by_role("table", name="Open holds").locator("tr").all_inner_texts()
    assert [row.split("\t") for row in rows][1:] == [["3", until, "order-1 (order 1)"], ["1", ANY, long]]
    rows = await page.get_by_role("table", name="Latest changes").locator("tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["version", "amount", "held", "balance", "reference"],
        ["4", "-2", "-2", "8", ""],
        ["3", "0", "1", "10", ""],
        ["2", "0", "2", "10", ""],
        ["1", "0", "3", "10", "order 1"],
        ["0", "10", "", "10", "opening"],
    ]
    for width, height in SIZES.values():
        await page.set_viewport_size({"width": width, "height": height})
        assert await overflow(page) == 0
    assert wrong == []


async def test_the_page_of_the_api_shows_every_endpoint_and_fits(browser: Browser, service: Service) -> None:
    page, wrong = await visited(browser, service.url, SIZES["phone"])
    await page.goto(service.url + "/docs")
    await expect(page.locator("details")).to_have_count(len(ENDPOINTS))
    shown = await page.locator("summary").all_inner_texts()
    assert {tuple(text.split()[:2]) for text in shown} == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}
    await page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert await overflow(page) == 0
    assert wrong == []


async def test_requests_can_be_tried_on_the_page_of_the_api(browser: Browser, service: Service) -> None:
    page, wrong = await visited(browser, service.url, SIZES["phone"])
    await page.get_by_role("link", name="API").click()

    async def tried(summary: str, answer: str, **values: str) -> None:
        operation = page.locator("details").filter(has=page.locator("summary", has_text=summary))
        if await operation.get_attribute("open") is None:
            await operation.locator("summary").click()
        for label, value in values.items():
            await operation.get_by_label(label.replace("_", "-"), exact=True).fill(value)
        await operation.get_by_role("button", name="Send").click()
        await expect(operation.get_by_role("status")).to_have_text(answer)
        assert await overflow(page) == 0

    update = "Change one user's balance"
    await tried(update, '200 OK {"userId":1,"newBalance":8}', Idempotency_Key="first")
    await tried(update, '200 OK {"userId":1,"newBalance":6}', Idempotency_Key="once")
    await tried(update, '200 OK {"userId":1,"newBalance":6}')
    account = '{"userId":1,"balance":6,"held":0,"available":6,"minimumBalance":0,"version":2}'
    await tried("Read an account, as", f"200 OK {account}", userId="1")
    await tried("Read all accounts", f'200 OK {{"users":[{account}],"next":null}}', limit="1")
    place = "Set money aside"
    await tried(
        place,
        '400 Bad Request {"error":"amount: expected an integer from 1 to 9007199254740991"}',
        userId="1",
        holdId="a/b",
        body='{"amount": 0}',
    )
    assert [text for text in wrong if "400" not in text] == []


async def test_with_a_token_set_the_page_asks_for_it_once(browser: Browser, database: Database, tmp_path: Path) -> None:
    """In a field, with which all of the page goes on, and so do the pages that it links to."""
    database.open({1: 10})
    environment = {"DATABASE_URL": database.url, "API_TOKEN": "sesame"}
    async with running_service(environment, tmp_path) as service:
        page = await browser.new_page(viewport={"width": 360, "height": 740})
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(service.url + "/")
        field = page.get_by_label("this service wants a token")
        await expect(field).to_be_visible()
        await page.get_by_role("button", name="Show").click()
        await page.wait_for_timeout(2_500)  # in which it must not ask again by itself
        assert len(asked) < 6
        assert await overflow(page) == 0
        await field.fill("open")
        await page.keyboard.press("Enter")
        await expect(field).to_be_visible()
        await field.fill("sesame")
        await page.keyboard.press("Enter")
        await expect(page.locator("#state")).to_have_text("live")
        await expect(page.locator("#balance")).to_have_text("10, available 10")
        await expect(field).to_be_hidden()
        await page.get_by_role("link", name="metrics").click()
        await expect(page.locator("body")).to_contain_text("atomic_balance_changes_total")
        await page.go_back()
        await page.get_by_role("link", name="API").click()
        await expect(page.locator("details")).to_have_count(len(ENDPOINTS))
        await expect(page.get_by_label("this API wants a token")).to_be_hidden()


async def test_with_a_token_to_read_the_page_shows_everything(
    browser: Browser, database_url: str, tmp_path: Path
) -> None:
    environment = {"DATABASE_URL": database_url, "API_TOKEN": "sesame", "READ_TOKEN": "look"}
    async with running_service(environment, tmp_path) as service:
        page = await browser.new_page()
        await page.goto(service.url + "/")
        await page.get_by_label("this service wants a token").fill("look")
        await page.get_by_role("button", name="Use it").click()
        await expect(page.locator("#state")).to_have_text("live")
        await page.get_by_role("button", name="Show").click()
        await expect(page.locator("#balance")).to_have_text("User not found")
