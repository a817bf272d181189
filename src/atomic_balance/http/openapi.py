"""The OpenAPI 3.1 document, made from the table of endpoints, the msgspec types and the table of errors."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
from msgspec import Struct

from atomic_balance.http.endpoints import ENDPOINTS, Endpoint
from atomic_balance.http.errors import PROBLEMS, problem_type
from atomic_balance.http.messages import Error, IdempotencyKey, ProblemDetails

_DESCRIPTION = (
    'A balance per user that is never wrong. An error is `{"error": ...}`, or problem details (RFC 9457) for those who '
    "accept `application/problem+json`. An update that was sent with an `Idempotency-Key` can be repeated safely, and "
    "so can every request for a hold."
)
_VARY = {"Vary": {"description": "Errors depend on Accept", "schema": {"const": "Accept"}}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait before asking again", "schema": {"type": "integer"}}}
_REPLAYED = {
    "Idempotent-Replayed": {
        "description": "Present if an earlier request with this key was the one that was applied or refused",
        "schema": {"const": "true"},
    }
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Names the change: the same key with the same change gives the first outcome again. Per user. "
    "A key that begins with a quote is sent as a quoted string (RFC 8941).",
    "schema": msgspec.json.schema(IdempotencyKey),
    "example": "4711-1",
}
_SECURITY_SCHEMES = {
    name: {"type": "http", "scheme": "bearer", "description": text}
    for name, text in {
        "API_TOKEN": "One of the setting API_TOKEN: it allows everything. A service without one asks for none",
        "READ_TOKEN": "One of the setting READ_TOKEN: it allows GET and HEAD",
    }.items()
}


def document(version: str) -> dict[str, Any]:
    """The document for this `version` of the service, as builtins that encode to JSON."""
    shapes: dict[str, type[Struct]] = {shape.__name__: shape for shape in (Error, ProblemDetails)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        for shape in (endpoint.body, *chain.from_iterable(reply.shapes for reply in endpoint.replies.values())):
            if shape is not None:
                shapes[shape.__name__] = shape
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    _, schemas = msgspec.json.schema_components(shapes.values(), ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "atomic-balance", "version": version, "description": _DESCRIPTION},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SECURITY_SCHEMES},
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "parameters": [
            *([_IDEMPOTENCY_KEY] if endpoint.idempotent else []),
            *(parameter for shape in endpoint.parameters for parameter in _parameters(endpoint, shape)),
        ],
        "responses": {**_replies(endpoint), **_errors(endpoint)},
        "security": _security(endpoint),
    }
    if endpoint.body is not None:
        examples = {name: {"value": value} for name, value in endpoint.examples.items()}
        content = {"application/json": {"schema": _reference(endpoint.body), "examples": examples}}
        operation["requestBody"] = {"required": endpoint.body_required, "content": content}
    return operation


def _security(endpoint: Endpoint) -> list[dict[str, list[str]]]:
    """The tokens of which one is enough. The empty option is there because a service may ask for no token."""
    if "unauthorized" not in endpoint.errors and 401 not in endpoint.replies:
        return []
    names = ("API_TOKEN",) if "forbidden" in endpoint.errors else ("API_TOKEN", "READ_TOKEN")
    options: list[dict[str, list[str]]] = [{name: []} for name in names]
    return [*options, {}]


def _parameters(endpoint: Endpoint, shape: type[Struct]) -> Iterator[dict[str, Any]]:
    schema = msgspec.json.schema(shape)["$defs"][shape.__name__]
    for name, member in schema["properties"].items():
        in_path = f"{{{name}}}" in endpoint.path
        # A parameter can be left out, but is never null.
        member = next((option for option in member.get("anyOf", ()) if option != {"type": "null"}), member)
        member = {key: value for key, value in member.items() if value is not None}
        yield {"name": name, "in": "path" if in_path else "query", "required": in_path, "schema": member}


def _replies(endpoint: Endpoint) -> dict[str, Any]:
    return {
        str(status): {
            "description": reply.text,
            **({"headers": _REPLAYED} if endpoint.idempotent or endpoint.replays else {}),
            "content": {
                reply.content_type: {
                    "schema": _one_of(reply.shapes),
                    **({"example": reply.example} if reply.example else {}),
                }
            },
        }
        for status, reply in endpoint.replies.items()
    }


def _errors(endpoint: Endpoint) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for code in endpoint.errors:
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    return {
        str(status): {
            "description": "; ".join(PROBLEMS[code].text for code in codes),
            "headers": {
                **_VARY,
                **(_RETRY_AFTER if status == 503 else {}),
                **(_REPLAYED if (endpoint.idempotent or endpoint.replays) and status == 400 else {}),
            },
            "content": {
                "application/json": {
                    "schema": _reference(Error),
                    "examples": {code: {"value": {"error": PROBLEMS[code].text}} for code in codes},
                },
                "application/problem+json": {
                    "schema": _reference(ProblemDetails),
                    "examples": {code: {"value": _details(code)} for code in codes},
                },
            },
        }
        for status, codes in by_status.items()
    }


def _details(code: str) -> dict[str, Any]:
    problem = PROBLEMS[code]
    return {"type": problem_type(code), "title": problem.text, "status": problem.status, "detail": problem.text}


def _one_of(shapes: Sequence[type[Struct]]) -> dict[str, Any]:
    options = [_reference(shape) for shape in shapes]
    return {"oneOf": options} if len(options) > 1 else options[0] if options else {}


def _reference(shape: type[Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}
