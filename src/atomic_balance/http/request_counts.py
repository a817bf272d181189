"""Requests as they are counted: by the endpoint that answered, and by the status.

What no endpoint answered (no such path, no such method), and a status that the endpoint's contract does not name, is
counted as "other". HEAD counts as GET, whose endpoint answers it.
"""

from aiohttp.typedefs import Handler

from atomic_balance.http.endpoints import ENDPOINTS
from atomic_balance.http.errors import PROBLEMS

_OTHER = None
_STATUSES = sorted({problem.status for problem in PROBLEMS.values()} | {s for each in ENDPOINTS for s in each.statuses})
_KINDS: dict[tuple[Handler | None, int], tuple[str, str, str]] = {
    **{(each.handler, status): (each.method, each.path, str(status)) for each in ENDPOINTS for status in each.statuses},
    **{(_OTHER, status): ("other", "other", str(status)) for status in _STATUSES},
}
_CELLS = {kind: cell for cell, kind in enumerate(_KINDS)}

KINDS_OF_REQUESTS = tuple(_KINDS.values())
"""Method, path and status of each kind that is counted; its place here is the cell where it is counted."""


def request_cell(handler: Handler, status: int) -> int:
    """The cell in which a request that `handler` answered with `status` is counted."""
    cell = _CELLS.get((handler, status))
    return _CELLS[_OTHER, status] if cell is None else cell
