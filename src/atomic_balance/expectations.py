"""Turns an error of msgspec into one line that names the bad member and what was expected."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_NAME_CHARACTERS_MAX = 100
_MEMBER_IN_MESSAGE = re.compile(r"^Object (?P<fault>missing required|contains unknown) field `(?P<name>[^`]*)`")


@cache
def expected(shape: type[msgspec.Struct]) -> dict[str, str]:
    """What `shape` and the Structs in it expect: encoded member name -> the description in the member's type."""
    return dict(_descriptions(inspect.type_info(shape)))


def _descriptions(node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, inspect.StructType):
        for field in node.fields:
            for option in field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,):
                if isinstance(option, inspect.Metadata):
                    yield field.encode_name, (option.extra_json_schema or {})["description"]
                    option = option.type
                if isinstance(option, inspect.ListType):
                    yield from _descriptions(option.item_type)


def explain(error: Exception, shape: type[msgspec.Struct]) -> str:
    """One line, `member: expected ...`, for an error that decoding or converting to `shape` raised.

    A Struct's own `__post_init__` raises ValueError with nothing but the member's name. For bytes that are not JSON the
    member is `body`.
    """
    if not isinstance(error, msgspec.ValidationError):
        return "body: expected JSON in UTF-8"
    found = _PATH.search(str(error))
    path = found["path"] if found else ""
    message = _PATH.sub("", str(error))
    members = expected(shape)
    missing = _MEMBER_IN_MESSAGE.match(message)
    if missing and missing["fault"] == "contains unknown":
        return f"{_join(path, _cut(missing['name']))}: expected no such member"
    if missing:
        path = _join(path, missing["name"])
    elif message in members:
        path = _join(path, message)
    name = re.sub(r"\[\d*\.*\]$", "", path).rsplit(".", 1)[-1]
    if path.endswith("]"):
        return f"{path}: expected a JSON object"
    return f"{path or 'body'}: expected {members.get(name, 'a JSON object')}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _cut(name: str) -> str:
    """`name`, shortened: a caller may send a name of any length, and the answer repeats it."""
    return name if len(name) <= _NAME_CHARACTERS_MAX else f"{name[:_NAME_CHARACTERS_MAX]}…"
