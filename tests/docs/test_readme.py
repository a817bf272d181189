"""README.md: the first request is answered as it says, on a PostgreSQL of one's own too."""

import sys
from pathlib import Path

import pytest

from tests.docs.pasting import bash, blocks
from tests.processes import ROOT

BLOCKS = blocks((ROOT / "README.md").read_text())
OWN_DATABASE = next(code for _, code in BLOCKS if "yoyo apply" in code)
FIRST_REQUEST = next(code for _, code in BLOCKS if code.startswith("curl -X POST"))
FIRST_ANSWER = next(code for language, code in BLOCKS if language == "json")

_BEGUN = "\nservice=$!\ntrap 'kill $service; wait $service' EXIT\n"
_READY = "curl -s --retry 100 --retry-delay 1 --retry-all-errors --fail -o /dev/null localhost:3000/readyz\n"


@pytest.mark.slow
async def test_the_first_request_on_a_database_of_ones_own(
    empty_database_url: str, tmp_path: Path, unused_tcp_port: int
) -> None:
    """But for the port and the URL as pasted, and without the installation, which is there."""
    for name, target in ((".venv", Path(sys.prefix)), ("sql", ROOT / "sql"), ("yoyo.ini", ROOT / "yoyo.ini")):
        (tmp_path / name).symlink_to(target)
    given = next(line for line in OWN_DATABASE.splitlines() if line.startswith("export DATABASE_URL="))
    url = empty_database_url.replace("postgresql://", "postgresql+psycopg://")
    commands = OWN_DATABASE.replace("./scripts/install.sh\n", "").replace(given, f"export DATABASE_URL='{url}'")
    assert commands.rstrip().endswith("/atomic-balance serve")
    script = f"export PORT={unused_tcp_port}\n{commands.rstrip()} &{_BEGUN}{_READY}{FIRST_REQUEST}"
    printed = await bash(script.replace("localhost:3000", f"localhost:{unused_tcp_port}"), tmp_path)
    assert printed.splitlines()[-1] == FIRST_ANSWER.strip()


def test_compose_opens_the_user_of_the_first_request() -> None:
    """Which no test can start, where there is no engine."""
    assert "atomic-balance migrate && atomic-balance open 1 10000" in (ROOT / "docker-compose.yml").read_text()
