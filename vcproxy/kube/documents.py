"""YAML or JSON of unknown origin, as plain data.

Only the YAML parser's events are used, no object is ever constructed by the library. The document is built from them
under a budget of bytes, nodes and depth; anchors, aliases and tags are refused, so there is no bomb to expand, and no
type to call. All scalars stay text (a plain null is None): whoever reads a field knows what it should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import msgspec
import yaml

from vcproxy.kube.errors import KubeconfigError, printable

MAX_BYTES = 1 << 20
"""Largest document in bytes; a Secret holds at most 1 MiB."""
MAX_DEPTH = 16
MAX_NODES = 20_000


def parse(data: bytes) -> object:
    """The document as dict, list, str and None. Raises KubeconfigError."""
    if len(data) > MAX_BYTES:
        _refuse(f"is larger than {MAX_BYTES} bytes", cure="give one context only")
    if data.lstrip()[:1] == b"{":
        try:
            return _bounded(msgspec.json.decode(data))
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            pass  # a YAML flow mapping begins the same way
    try:
        return _build(yaml.parse(data, Loader=yaml.CSafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        _refuse(f"is neither YAML nor JSON{line}")


def _bounded(value: object, depth: int = 0) -> object:
    """`value` with JSON's numbers and booleans as YAML's text. Raises KubeconfigError when too deep."""
    if depth > MAX_DEPTH:
        _refuse(f"is nested deeper than {MAX_DEPTH}")
    match value:
        case dict():
            return {key: _bounded(item, depth + 1) for key, item in value.items()}
        case list():
            return [_bounded(item, depth + 1) for item in value]
        case bool():
            return "true" if value else "false"
        case None | str():
            return value
        case _:
            return str(value)


def _build(events: Iterator[yaml.Event]) -> object:
    """One document of mappings (keys: text), sequences and scalars (text; a plain null is None) out of parser events.

    Iterative on purpose: depth is a number to compare here, not the C stack of the library's recursive composer.
    """
    root: list[object] = []
    stack: list[tuple[list[object] | dict[str, object], list[str]]] = [(root, [])]
    for count, event in enumerate(events):
        if count > MAX_NODES:
            _refuse(f"has more than {MAX_NODES} nodes", cure="give one context only")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            _refuse("uses YAML anchors or aliases", cure="write every value out")
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) is not None:
            _refuse("uses YAML tags", cure="write plain values")
        if isinstance(event, yaml.DocumentStartEvent) and root:
            _refuse("is more than one YAML document", cure="give one")
        value: object
        if isinstance(event, yaml.ScalarEvent):
            plain_null = event.implicit[0] and event.value in ("", "~", "null", "Null", "NULL")
            value = None if plain_null else event.value
        elif isinstance(event, yaml.MappingStartEvent):
            value = {}
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
        else:
            if isinstance(event, yaml.CollectionEndEvent):
                stack.pop()
            continue
        _attach(*stack[-1], value)
        if isinstance(value, list | dict):
            stack.append((value, []))
            if len(stack) > MAX_DEPTH:
                _refuse(f"is nested deeper than {MAX_DEPTH}")
    return root[0] if root else None


def _attach(parent: list[object] | dict[str, object], pending: list[str], value: object) -> None:
    """Adds a value to its parent; in a mapping every other value is a key, waiting in `pending` for the one that
    follows.
    """
    if isinstance(parent, list):
        parent.append(value)
    elif pending:
        parent[pending.pop()] = value
    elif not isinstance(value, str):
        _refuse("has a key that is not text")
    elif value in parent:
        _refuse(f"the key {printable(value, 64)!r} appears twice", cure="keep one")
    else:
        pending.append(value)


def _refuse(reason: str, *, cure: str = "give a kubeconfig") -> NoReturn:
    raise KubeconfigError("document", reason, cure=cure)
