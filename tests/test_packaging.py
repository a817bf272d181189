"""What setup.cfg and docker-compose.yml list by hand is complete."""

from configparser import RawConfigParser

from tests.processes import ROOT


def test_every_package_is_installed() -> None:
    """An editable installation finds those that are missing too; a wheel, and so the image, does not."""
    setup = RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    source = ROOT / "src"
    folders = {path.parent.relative_to(source) for path in source.glob("atomic_balance/**/__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"atomic_balance.sql", "atomic_balance.sql.citus"}
    assert set(setup["options"]["packages"].split()) == expected
