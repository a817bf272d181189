"""setup.cfg lists every package: one that it leaves out would be missing from an installation, not from a checkout."""

from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    found = [".".join(init.parent.relative_to(ROOT / "src").parts) for init in ROOT.glob("src/**/__init__.py")]
    assert sorted(name for name in listed if ".sql" not in name) == sorted(found)
