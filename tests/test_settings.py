"""Settings: where they come from, and what a wrong one says."""

import re
import sys
from pathlib import Path

import pytest

from atomic_balance import expectations
from atomic_balance.settings import Settings, WrongSettingError, read_settings, workers_for
from tests.processes import ROOT, bare_environment, run


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.__struct_encode_fields__:
        monkeypatch.delenv(name, raising=False)


def test_the_defaults(tmp_path: Path) -> None:
    settings = read_settings(tmp_path / "none")
    assert (settings.host, settings.port, settings.database_url) == ("127.0.0.1", 3000, None)


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".env"
    file.write_text("HOST=127.0.0.2\nPORT=4000\nDATABASE_URL=\n")
    monkeypatch.setenv("PORT", "5000")
    settings = read_settings(file)
    assert (settings.host, settings.port, settings.database_url) == ("127.0.0.2", 5000, None)


def test_the_example_shows_every_setting_with_its_default() -> None:
    shown = dict(re.findall(r"^#([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    defaults = {name: getattr(Settings(), name.lower()) for name in Settings.__struct_encode_fields__}
    assert set(shown) == set(defaults)
    del shown["DATABASE_URL"], defaults["DATABASE_URL"]
    expected = {name: "" if value is None else str(value) for name, value in defaults.items()}
    assert {name: value.lower() for name, value in shown.items()} == {k: v.lower() for k, v in expected.items()}


def test_the_page_shows_every_setting_once_with_its_default_and_what_it_expects() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    shown = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    defaults = {name: getattr(Settings(), name.lower()) for name in Settings.__struct_encode_fields__}
    assert sorted(shown) == sorted(
        (name, "none" if value is None else f"`{str(value).lower()}`", expectations.expected(Settings)[name])
        for name, value in defaults.items()
    )


def test_workers_leave_the_database_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [workers_for(cores) for cores in (1, 2, 4, 8, 16, 1_000)] == [1, 2, 3, 6, 12, 100]
    monkeypatch.setenv("WORKERS", "Auto")
    monkeypatch.setattr("atomic_balance.settings._cores", lambda: 4)
    assert read_settings(tmp_path / "none").workers == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"),
        ("PORT", "-1"),
        ("PORT", "65536"),
        ("PORT", "80.5"),
        ("LOG_LEVEL", "loud"),
        ("DATABASE_URL", "mysql://user:secret@host/database"),
        ("DATABASE_URL", "user:secret@host"),
        ("DATABASE_URL", "postgresql://user:secret@host:secret/database"),
        ("MIGRATIONS_DATABASE_URL", "user:secret@host"),
        ("PREPARED_STATEMENTS", "perhaps"),
        ("WORKERS", "0"),
        ("WORKERS", "automatic"),
        ("POOL_CONNECTIONS_MAX", "0"),
        ("CONNECT_SECONDS", "soon"),
        ("LOCK_SECONDS", "0.0009"),
        ("STATEMENT_SECONDS", "0"),
        ("STATEMENT_SECONDS", "nan"),
        ("STATEMENT_SECONDS", "11"),
        ("DEADLINE_SECONDS", "-1"),
        ("SHUTDOWN_SECONDS", "1e9"),
        ("IDLE_SECONDS", "0"),
        ("BODIES_BYTES_MAX", "lots"),
        ("BODIES_BYTES_MAX", "1000"),
        ("ALLOW_ANONYMOUS", "perhaps"),
        ("API_TOKEN", "secret token"),
        ("API_TOKEN", "secret,,other"),
        ("READ_TOKEN", "secret token"),
        ("ALLOWED_HOSTS", "example.org:80"),
        ("ALLOWED_HOSTS", "https://example.org"),
        ("ALLOWED_HOSTS", "one,,two"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_was_expected(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(WrongSettingError, match=f"^{name}: expected [^\n]+$") as caught:
        read_settings(tmp_path / "none")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "by_host"),
    [
        ("postgresql://", ["postgresql://"]),
        ("postgresql:///db", ["postgresql:///db"]),
        ("postgresql+psycopg://u:p@h/db", ["postgresql://u:p@h/db"]),
        ("postgresql://u:p@one:1,two/db?a=b", ["postgresql://u:p@one:1/db?a=b", "postgresql://u:p@two/db?a=b"]),
        ("postgresql://[::1]:5,two?a=b", ["postgresql://[::1]:5?a=b", "postgresql://two?a=b"]),
        ("postgresql://u@/db?host=/a,/b&c=d", ["postgresql://u@/db?host=/a&c=d", "postgresql://u@/db?host=/b&c=d"]),
    ],
)
def test_each_host_of_a_url_has_one_of_its_own(url: str, by_host: list[str]) -> None:
    assert Settings(database_url=url).host_urls == by_host


def test_the_processes_of_the_tests_are_given_no_setting_that_happens_to_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in Settings.__struct_encode_fields__:
        monkeypatch.setenv(name, "there")
    assert bare_environment().keys().isdisjoint(Settings.__struct_encode_fields__)


async def test_migrations_want_one_host(database_url: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": "postgresql://user:secret@one,two/db"}
    command = (sys.executable, "-m", "atomic_balance", "migrate")
    status, output = await run(*command, directory=tmp_path, environment=environment)
    expected = "atomic-balance: MIGRATIONS_DATABASE_URL: expected a URL with one host, as yoyo knows no more\n"
    assert (status, output) == (2, expected)
    environment["MIGRATIONS_DATABASE_URL"] = database_url
    assert await run(*command, directory=tmp_path, environment=environment) == (0, "the schema is current\n")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org"])
def test_only_loopback_is_served_to_anyone(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", host)
    with pytest.raises(WrongSettingError, match=r"^API_TOKEN: expected one, because HOST can be reached from outside"):
        read_settings(tmp_path / "none")
    monkeypatch.setenv("API_TOKEN", "one, two")
    assert read_settings(tmp_path / "none").api_tokens == ["one", "two"]
    monkeypatch.delenv("API_TOKEN")
    monkeypatch.setenv("ALLOW_ANONYMOUS", "true")
    assert read_settings(tmp_path / "none").host == host


@pytest.mark.parametrize(
    ("api_token", "expected"),
    [
        (None, "API_TOKEN: expected one beside READ_TOKEN, or everybody could write"),
        ("write,read", "READ_TOKEN: expected tokens that are not in API_TOKEN, which may write"),
        ("write", None),
    ],
)
def test_a_token_to_read_stands_beside_one_to_write(
    api_token: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("READ_TOKEN", "see, read")
    if api_token:
        monkeypatch.setenv("API_TOKEN", api_token)
    if expected:
        with pytest.raises(WrongSettingError, match=f"^{expected}$"):
            read_settings(tmp_path / "none")
    else:
        assert read_settings(tmp_path / "none").read_tokens == ["see", "read"]


async def test_a_wrong_value_ends_the_start_with_one_line_and_exit_2(tmp_path: Path) -> None:
    status, output = await run(sys.executable, "-m", "atomic_balance", directory=tmp_path, environment={"PORT": "http"})
    expected = "atomic-balance: PORT: expected a port from 1 to 65535, or 0 for any free one\n"
    assert (status, output) == (2, expected)


@pytest.mark.parametrize(
    "url", ["postgresql://user:secret@127.0.0.1:1/none", "postgresql://user:secret@127.0.0.1:99999/none"]
)
async def test_a_database_that_does_not_answer_is_one_line_without_the_password(url: str, tmp_path: Path) -> None:
    for command in (("migrate",), ("open", "1", "10"), ("verify",)):
        status, output = await run(
            *(sys.executable, "-m", "atomic_balance", *command), directory=tmp_path, environment={"DATABASE_URL": url}
        )
        assert (status, len(output.splitlines())) == (1, 1), output
        assert output.startswith("atomic-balance: database: ")
        assert "secret" not in output
