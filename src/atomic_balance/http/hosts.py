"""Which host names a service without tokens answers to.

A browser on this machine may have anyone's page open, and the page can send requests to such a service once the name
it came from resolves to this machine (DNS rebinding). Those requests carry that name in their `Host` header, so only
requests for the service's own names are answered.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from atomic_balance.settings import Settings

_HEADER = re.compile(r"(?P<host>\[[^]]*\]|[^:]*)(:\d*)?")
_REMEMBERED_MAX = 128


def host_check(settings: Settings) -> Callable[[str], bool]:
    """A function that says whether a request with this `Host` header, with a port or without, is answered.

    It is if the header names loopback (`localhost`, names that end in `.localhost`, any loopback address),
    `settings.host` or one of `settings.allowed_host_names`.
    """
    own = _host(settings.host)
    known = {own, "localhost", *map(_host, settings.allowed_host_names)}
    # Where HOST is a name or a wildcard, it does not say which addresses are this machine's, so every address is
    # answered. That is safe: only a name can be made to resolve to this machine.
    any_address = isinstance(own, str) or own.is_unspecified

    @lru_cache(maxsize=_REMEMBERED_MAX)
    def is_answered(header: str) -> bool:
        found = _HEADER.fullmatch(header)
        if found is None:
            return False
        host = _host(found["host"])
        if isinstance(host, str):
            return host in known or host.endswith(".localhost")
        return any_address or host.is_loopback or host in known

    return is_answered


def _host(text: str) -> str | IPv4Address | IPv6Address:
    """`text` as an address, in brackets or not; if it is none, as a name in lower case without a dot at its end."""
    name = text.strip("[]").lower().removesuffix(".")
    try:
        return ip_address(name)
    except ValueError:
        return name
