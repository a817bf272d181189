"""A real PostgreSQL for every test: one server for the session, a fresh migrated database for each test."""

import functools
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import psycopg
import pytest
from aiohttp import ClientTimeout
from aiohttp.test_utils import TestClient
from msgspec.structs import replace
from pytest_aiohttp import AiohttpClient

from atomic_balance.http.app import make_app
from atomic_balance.postgres.embedded import embedded_postgres
from atomic_balance.postgres.session import connect
from atomic_balance.settings import Settings
from tests import cluster
from tests.client import Client, session
from tests.database import Database
from tests.processes import ALWAYS
from tests.schema import make_schema

ANSWER_SECONDS = 30

_numbers = itertools.count(1)

collect_ignore = [] if cluster.URL else ["whole/test_cluster.py"]


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server, without the database's name: to be formatted with `database`."""
    data_dir: Path = tmp_path_factory.mktemp("postgres")
    with embedded_postgres(data_dir) as url:
        server = url.replace("/postgres?", "/{database}?")
        with psycopg.connect(url, autocommit=True) as admin:
            # Nothing here outlives the machine, and without it a database is dropped thirty times as fast.
            admin.execute("ALTER SYSTEM SET fsync = off")
            admin.execute("SELECT pg_reload_conf()")
            admin.execute("CREATE DATABASE migrated")
        make_schema(server.format(database="migrated"))
        yield server


@pytest.fixture(autouse=True)
def statement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the services of a test apply changes with: on PostgreSQL, with what is for Citus, or on a cluster."""
    name: str = getattr(request, "param", "apply_changes")
    if name != "apply_changes":
        monkeypatch.setitem(ALWAYS, "CITUS", "true")
        for module in ("atomic_balance.http.app", "tests.committing"):
            monkeypatch.setattr(f"{module}.connect", lambda settings: connect(replace(settings, citus=True)))
    return name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that is marked so over both statements that can apply changes, and on a cluster if there is one.

    The second is slow, as it shows again what the first did.
    """
    marked = metafunc.definition.get_closest_marker
    names = ["apply_changes"]
    if marked("over_both_statements"):
        names.append("apply_shard_changes")
    if marked("on_a_cluster") and cluster.URL:
        names.append("cluster")
    if len(names) > 1:
        params = [pytest.param(name, marks=pytest.mark.slow if number else ()) for number, name in enumerate(names)]
        metafunc.parametrize("statement", params, indirect=True)


@pytest.fixture
def empty_database_url(postgres: str) -> Iterator[str]:
    """The URL of a fresh database with nothing in it."""
    yield from _fresh_database(postgres, "template1")


@pytest.fixture
def database_url(postgres: str, statement: str) -> Iterator[str]:
    """The URL of a fresh database with the current schema."""
    if statement == "cluster":
        yield from cluster.fresh_database()
        return
    for url in _fresh_database(postgres, "migrated"):
        with psycopg.connect(url, autocommit=True) as connection:
            # A copy begins its feed anew, and would wait for writers when the service first connects.
            connection.execute("SELECT keep_feed_ascending()")
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh database with the current schema, seen from outside the service."""
    with Database(database_url) as database:
        yield database


@pytest.fixture
def latin1_database_url(postgres: str) -> Iterator[str]:
    """The URL of a fresh database that can't hold every text."""
    yield from _fresh_database(postgres, "template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'")


def _fresh_database(postgres: str, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.format(database="postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        yield postgres.format(database=name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def settings(database_url: str, statement: str) -> Settings:
    """The settings of a service on a fresh database."""
    return Settings(database_url=database_url, citus=statement == "cluster")


@pytest.fixture
def aiohttp_client_cls() -> Callable[..., Client]:
    """Clients that wait for an answer so long that it will not come any more, and no longer."""
    return functools.partial(TestClient, timeout=ClientTimeout(ANSWER_SECONDS))


@pytest.fixture
async def caller() -> AsyncIterator[aiohttp.ClientSession]:
    """A caller of services that are processes of their own."""
    async with session() as caller:
        yield caller


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, settings: Settings) -> Client:
    """A client of a service in this process, on a fresh database."""
    return await aiohttp_client(make_app(settings))
