"""The soak test: load of every kind and faults of every kind at once, then every answer is held against the journal.

Each change bears a reference or an id of its own, so that each row of the journal can be traced to the request that
caused it.
"""

from tests.soak.run import soak

__all__ = ["soak"]
