"""Which accounts lie together: on the shards of a Citus cluster, or elsewhere all of them on one."""

from bisect import bisect_right

from msgspec import Struct

_32_BITS = 0xFFFFFFFF


class Shards(Struct, frozen=True):
    """The shards of `users`, numbered from 0; `bounds`: the least hash of each but the first, ascending."""

    bounds: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many there are: at least one."""
        return len(self.bounds) + 1

    def of(self, user_id: int) -> int:
        """The number of the shard that an account lies on."""
        return bisect_right(self.bounds, hash_of(user_id)) if self.bounds else 0


def hash_of(user_id: int) -> int:
    """What Citus shards by: `hashint8(user_id)`, as a signed integer of 32 bits.

    As PostgreSQL reckons it (https://github.com/postgres/postgres, hashint8 in src/backend/access/hash/hashfunc.c and
    hash_bytes_uint32 in src/common/hashfn.c, after Bob Jenkins' lookup3). `user_id`: not negative.
    """
    start = 0x9E3779B9 + 4 + 3923095 & _32_BITS
    a = start + ((user_id ^ user_id >> 32) & _32_BITS) & _32_BITS
    c = _mixed(0, start, 14)
    a = _mixed(a ^ c, c, 11)
    b = _mixed(start ^ a, a, 25)
    c = _mixed(c ^ b, b, 16)
    a = _mixed(a ^ c, c, 4)
    b = _mixed(b ^ a, a, 14)
    c = _mixed(c ^ b, b, 24)
    return c - (c >> 31 << 32)


def _mixed(mixed: int, by: int, bits: int) -> int:
    """`mixed` less `by` rotated to the left, in 32 bits."""
    return mixed - (by << bits | by >> 32 - bits) & _32_BITS
