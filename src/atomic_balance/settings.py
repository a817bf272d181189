"""Every setting of the service, read once from the environment and `.env`."""

import math
import os
import re
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from dotenv import dotenv_values
from msgspec import Meta

from atomic_balance.expectations import explain

_HOST = r"(\[[0-9a-fA-F:.]+\]|[^@/?#,:\[\]]*)(:\d{1,5})?"
_DATABASE_URL = rf"^postgres(ql)?(\+psycopg)?://([^@/?#]*@)?{_HOST}(,{_HOST})*(/[^?#]*)?(\?[^#]*)?$"

_NAME = r"([0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+\])"

Seconds = Annotated[float, Meta(gt=0, le=3600, description="a number of seconds above 0, up to 3600")]

TokenList = Annotated[
    str,
    Meta(
        pattern=r"\A[!-+\--~]+( *, *[!-+\--~]+)*\Z",
        description="a token of visible ASCII characters, or several with commas between them",
    ),
]

WORKERS_MAX = 100
_WORKERS_PER_CORE = 0.7  # a change takes about 50 us of a worker and 20 us of a database that shares the cores

Count = Annotated[int, Meta(ge=1, le=10_000_000, description="a number of changes, 1 to 10000000")]


class Settings(msgspec.Struct, frozen=True, kw_only=True, rename=str.upper):
    """All settings, each under its name in capitals. A time is in seconds, a size in bytes."""

    host: Annotated[str, Meta(min_length=1, description="a host name or address to listen on")] = "127.0.0.1"
    workers: Annotated[int, Meta(ge=1, le=WORKERS_MAX, description="a number of processes, 1 to 100, or auto")] = 1
    port: Annotated[int, Meta(ge=0, le=65535, description="a port from 1 to 65535, or 0 for any free one")] = 3000
    api_token: TokenList | None = None
    read_token: TokenList | None = None
    allowed_hosts: (
        Annotated[
            str,
            Meta(
                pattern=rf"\A{_NAME}( *, *{_NAME})*\Z",
                description="a host name or address without a port, or several with commas between them",
            ),
        ]
        | None
    ) = None
    allow_anonymous: Annotated[bool, Meta(description="true or false")] = False
    demo: Annotated[bool, Meta(description="true or false")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="one of debug, info, warning, error")
    ] = "info"
    log_requests: Annotated[bool, Meta(description="true or false")] = False

    database_url: (
        Annotated[
            str,
            Meta(
                pattern=_DATABASE_URL,
                description="postgresql://user:password@host:port/database, or nothing for the embedded PostgreSQL",
            ),
        ]
        | None
    ) = None
    migrations_database_url: (
        Annotated[
            str,
            Meta(pattern=_DATABASE_URL, description="postgresql://user:password@host:port/database, with one host"),
        ]
        | None
    ) = None
    database_schema: (
        Annotated[
            str,
            Meta(
                pattern=r"\A(?!pg_)[a-z_][a-z0-9_]{0,62}\Z",
                description="the name of a schema, of a-z, 0-9 and _, up to 63, or nothing for the search path",
            ),
        ]
        | None
    ) = None
    citus: Annotated[bool, Meta(description="true or false")] = False
    prepared_statements: Annotated[bool, Meta(description="true or false")] = True
    data_dir: Annotated[str, Meta(min_length=1, description="a directory for the embedded PostgreSQL")] = ".data"
    postgres_bin_dir: (
        Annotated[str, Meta(min_length=1, description="the directory that holds the programs postgres and initdb")]
        | None
    ) = None

    lanes: Annotated[int, Meta(ge=2, le=100, description="a number of connections, 2 to 100")] = 4
    changes_per_statement_max: Annotated[int, Meta(ge=1, le=1000, description="a number of changes, 1 to 1000")] = 1000
    accounts_per_statement_max: Annotated[int, Meta(ge=1, le=1000, description="a number of accounts, 1 to 1000")] = (
        1000
    )
    waiting_changes_max: Count = 40_000
    waiting_changes_per_account_max: Count = 20_000
    pool_connections_max: Annotated[int, Meta(ge=1, le=1000, description="a number of connections, 1 to 1000")] = 10
    connect_seconds: Seconds = 3
    # PostgreSQL counts it in whole milliseconds, and 0 would be no timeout at all.
    lock_seconds: Annotated[float, Meta(ge=0.001, le=3600, description="a number of seconds from 0.001 to 3600")] = 0.1
    statement_seconds: Seconds = 2
    deadline_seconds: Seconds = 10
    drain_seconds: Seconds = 0.2
    shutdown_seconds: Seconds = 20
    idle_seconds: Seconds = 75
    bodies_bytes_max: Annotated[int, Meta(ge=2**23, le=2**40, description="a number of bytes from 8388608 on")] = 2**26

    @property
    def api_tokens(self) -> list[str]:
        """The tokens that let a caller do everything. If there are none, everybody may."""
        return _separate(self.api_token)

    @property
    def read_tokens(self) -> list[str]:
        """The tokens that let a caller read, and no more."""
        return _separate(self.read_token)

    @property
    def offers_races(self) -> bool:
        """Whether the live page offers its races, which open accounts and change them."""
        return self.demo and not self.read_tokens

    @property
    def allowed_host_names(self) -> list[str]:
        """The names, besides its own, that a service without tokens answers to."""
        return [name.strip() for name in (self.allowed_hosts or "").split(",") if name.strip()]

    @property
    def url(self) -> str:
        """`database_url` with the scheme that asyncpg and psycopg know. It may name several hosts."""
        if self.database_url is None:
            raise ValueError("there is no DATABASE_URL")
        return _plain(self.database_url)

    @property
    def host_urls(self) -> list[str]:
        """A URL for each host of `url`."""
        return _by_host(self.url)

    @property
    def migrations_url(self) -> str:
        """The URL of the one host to apply migrations on. Raises WrongSettingError if it names several."""
        url = _plain(self.migrations_database_url) if self.migrations_database_url else self.url
        if len(_by_host(url)) > 1:
            raise WrongSettingError("MIGRATIONS_DATABASE_URL: expected a URL with one host, as yoyo knows no more")
        return url


def _separate(tokens: str | None) -> list[str]:
    return [token.strip() for token in tokens.split(",")] if tokens else []


def _plain(url: str) -> str:
    return "postgresql://" + url.split("://", 1)[1]


_HOSTS = r"((?<=//)[^@/?#]*|(?<=@)[^@/?#]*)(?=[/?]|$)"
_SOCKETS = r"((?<=[?&]host=)[^&]*|$)"


def _by_host(url: str) -> list[str]:
    """A URL for each host of `url`. They stand before its path or, for sockets, in its parameter `host`."""
    before, hosts, after = re.split(_HOSTS, url, maxsplit=1)
    if not hosts:
        before, hosts, after = re.split(_SOCKETS, url, maxsplit=1)
    return [f"{before}{host}{after}" for host in hosts.split(",")]


_IN_ORDER = (
    ("lock_seconds", "statement_seconds"),
    ("statement_seconds", "deadline_seconds"),
    ("deadline_seconds", "shutdown_seconds"),
    ("waiting_changes_per_account_max", "waiting_changes_max"),
)


class WrongSettingError(Exception):
    """A setting has a wrong value; the text names the setting and what was expected, never the value."""


def read_settings(env_file: Path = Path(".env")) -> Settings:
    """Read the settings from the environment, which wins, and from `env_file` if there is one.

    An empty value counts as not set. Raises WrongSettingError.
    """
    try:
        given = {**dotenv_values(env_file), **os.environ}
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSettingError(f"{env_file}: expected a readable file of NAME=value lines") from error
    values = {name: value.strip() for name, value in given.items() if value and value.strip()}
    if values.get("WORKERS", "").lower() == "auto":
        values["WORKERS"] = str(workers_for(_cores()))
    if "LOG_LEVEL" in values:
        values["LOG_LEVEL"] = values["LOG_LEVEL"].lower()
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise WrongSettingError(explain(error, Settings)) from None
    for smaller, larger in _IN_ORDER:
        if getattr(settings, smaller) >= getattr(settings, larger):
            raise WrongSettingError(f"{smaller.upper()}: expected less than {larger.upper()}")
    if not (_is_loopback(settings.host) or settings.api_tokens or settings.allow_anonymous):
        raise WrongSettingError(
            "API_TOKEN: expected one, because HOST can be reached from outside (or set ALLOW_ANONYMOUS=true)"
        )
    if settings.read_tokens and not settings.api_tokens:
        raise WrongSettingError("API_TOKEN: expected one beside READ_TOKEN, or everybody could write")
    if set(settings.read_tokens) & set(settings.api_tokens):
        raise WrongSettingError("READ_TOKEN: expected tokens that are not in API_TOKEN, which may write")
    return settings


def workers_for(cores: int) -> int:
    """How many workers leave the database, on the same machine with so many cores, what it needs of them."""
    return min(math.ceil(_WORKERS_PER_CORE * cores), WORKERS_MAX)


def _cores() -> int:
    """How many cores this process may use. A container's limit on CPU time is not known here."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def with_new_tokens(settings: Settings, env_file: Path = Path(".env")) -> Settings:
    """`settings` with the tokens that the environment and `env_file` give now, and everything else as it was.

    Raises WrongSettingError, also if no token would be left, because that opens the service to everybody.
    """
    found = read_settings(env_file)
    if settings.api_tokens and not found.api_tokens:
        raise WrongSettingError("API_TOKEN: expected one, because there was one until now")
    return msgspec.structs.replace(settings, api_token=found.api_token, read_token=found.read_token)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
