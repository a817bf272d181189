"""Which names the service goes by, for a service that asks for no token.

Without a token anyone's page in a browser on this machine could ask, once its own name resolves to this machine's
address (DNS rebinding). Its requests still carry that name, so only the service's own names are answered.
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
    # A name or a wildcard does not say which addresses lead here, and an address can't be made to resolve elsewhere.
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
    """The address that `text` is, in brackets or not; otherwise the name, in its one spelling."""
    name = text.strip("[]").lower().removesuffix(".")
    try:
        return ip_address(name)
    except ValueError:
        return name
