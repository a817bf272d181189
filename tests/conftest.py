"""A real PostgreSQL for every test: one server for the session, a fresh migrated database for each test."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from aiohttp.test_utils import TestClient
from aiohttp.web import Application, Request
from pytest_aiohttp import AiohttpClient

from atomic_balance.app import make_app
from atomic_balance.embedded import embedded_postgres
from atomic_balance.migrations import migrate
from atomic_balance.settings import Settings

Client = TestClient[Request, Application]

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server, without the database's name: to be formatted with `database`."""
    data_dir: Path = tmp_path_factory.mktemp("postgres")
    with embedded_postgres(data_dir) as url:
        server = url.replace("/postgres?", "/{database}?")
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("CREATE DATABASE migrated")
        migrate(server.format(database="migrated"))
        yield server


@pytest.fixture
def empty_database_url(postgres: str) -> Iterator[str]:
    """The URL of a fresh database with nothing in it."""
    yield from _fresh_database(postgres, "template1")


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    """The URL of a fresh database with the current schema."""
    yield from _fresh_database(postgres, "migrated")


def _fresh_database(postgres: str, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.format(database="postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        yield postgres.format(database=name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def settings(database_url: str) -> Settings:
    """The settings of a service on a fresh database."""
    return Settings(database_url=database_url)


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, settings: Settings) -> Client:
    """A client of a service in this process, on a fresh database."""
    return await aiohttp_client(make_app(settings))
