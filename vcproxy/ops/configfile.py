"""Strict configuration files: YAML into frozen Structs, and errors that name file, line and field.

A silently ignored field is a setting that an operator believes in, so unknown and ill-typed fields are errors. The
shapes are msgspec Structs; what each field means is written once, as `Annotated[..., Meta(description=...)]`, and both
the error position and `vcproxy config default` come from there. A field of a type with a class method `parse`, text to
value or ValueError, is read by that, so that a bad CIDR is an error like any other.
"""

import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from vcproxy.ops import positions

API_VERSION = "vcproxy.dev/v1alpha1"
T = TypeVar("T", bound=msgspec.Struct)


class ConfigError(Exception):
    """The configuration cannot be used; the message names file, line and field and says what is wrong."""


class Section(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, kw_only=True):
    """Base of every configuration Struct: camelCase in files, unknown fields refused."""


def load(path: Path, shape: type[T]) -> T:
    """Read and check one configuration file. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return parse(text, shape, source=str(path))


def parse(text: str, shape: type[T], *, source: str) -> T:
    """Like `load`, from text; `source` stands where errors name the file."""
    document = Document.read(text, source=source, api_version=API_VERSION, kind=shape.__name__)
    return document.shaped(shape)


class Document(NamedTuple):
    """A YAML mapping of one apiVersion and kind, which knows the lines of its fields. `value` is without those two."""

    source: str
    root: yaml.Node | None
    value: dict[str, Any]

    @classmethod
    def read(cls, text: str, *, source: str, api_version: str, kind: str) -> "Document":
        """Raises ConfigError for what is not YAML, or something else."""
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{source}:{mark.line + 1}" if mark else source
            raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{source}:1: expected a mapping with apiVersion: {api_version} and kind: {kind}")
        for field, wanted in (("apiVersion", api_version), ("kind", kind)):
            if value.pop(field, None) != wanted:
                line = positions.line(root, (field,)) or 1
                raise ConfigError(f"{source}:{line}: {field}: expected {wanted}")
        return cls(source, root, value)

    def where(self, path: positions.Path) -> str:
        """`FILE:LINE: FIELD`."""
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        return f"{self.source}:{positions.line(self.root, path) or 1}: {name or 'file'}"

    def shaped(self, shape: type[T], *, dec_hook: Callable[[type, Any], Any] | None = None) -> T:
        """The value as a Struct. Raises ConfigError."""
        try:
            return msgspec.convert(self.value, shape, strict=True, dec_hook=dec_hook or _parse)
        except msgspec.ValidationError as error:
            message, path = explain(error)
            raise ConfigError(f"{self.where(path)}: {message}") from error


def convert(value: Any, shape: type[T]) -> T:
    """Plain data to a configuration Struct, strictly. Raises msgspec.ValidationError."""
    return msgspec.convert(value, shape, strict=True, dec_hook=_parse)


def explain(error: msgspec.ValidationError) -> tuple[str, positions.Path]:
    """What is wrong, and with which field."""
    message, _, place = str(error).partition(" - at `")
    path = positions.steps(place.rstrip("`").removeprefix("$"))
    if unknown := re.search(r"unknown field `([^`]*)`", message):
        path = (*path, unknown[1])
    return message, path


def _parse(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind.parse(value)


def describe(shape: type[msgspec.Struct]) -> str:
    """A configuration file of this kind with every field, its default and its comment: it loads as it is."""
    return "\n".join([f"apiVersion: {API_VERSION}", f"kind: {shape.__name__}", *_describe(shape, "")]) + "\n"


def _describe(shape: type[msgspec.Struct], indent: str) -> Iterator[str]:
    for field in msgspec.structs.fields(shape):
        comment = _description(field.type)
        yield from (f"{indent}# {line}" for line in comment.splitlines())
        default = _default(field)
        if (nested := _nested(field.type)) and (default is not None or field.required):
            yield f"{indent}{field.encode_name}:"
            yield from _describe(nested, indent + "  ")
        elif field.required or default is msgspec.NODEFAULT:
            yield f"{indent}{field.encode_name}:"
        else:
            if item := _item(field.type):
                yield from (f"{indent}# {line}" for line in _choices(item))
            yield f"{indent}{field.encode_name}: {_flow(default)}"
            if default is None and nested:
                yield from (f"{indent}#   {line}" for line in _describe(nested, ""))


def _choices(shape: type[msgspec.Struct]) -> Iterator[str]:
    """What an item of a list may be, one entry a field; below it, what the entry's own fields mean."""
    for field in msgspec.structs.fields(shape):
        inner = msgspec.structs.fields(nested) if (nested := _nested(field.type)) else ()
        value = {each.encode_name: "..." if each.required else _default(each) for each in inner}
        comment = f"  # {said}" if (said := _description(field.type)) else ""
        yield f"- {field.encode_name}: {_flow(value if nested else _default(field))}{comment}"
        yield from (f"    {each.encode_name}: {said}" for each in inner if (said := _description(each.type)))


def _default(field: msgspec.structs.FieldInfo) -> Any:
    return field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default


def _flow(value: Any) -> str:
    plain = msgspec.to_builtins(value, enc_hook=str)
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _description(hint: Any) -> str:
    if get_origin(hint) is typing.Annotated:
        for extra in hint.__metadata__:
            if isinstance(extra, msgspec.Meta) and extra.description:
                return extra.description
    return ""


def _item(hint: Any) -> type[msgspec.Struct] | None:
    """The Struct of which a field holds a list."""
    if get_origin(hint) is typing.Annotated:
        return _item(get_args(hint)[0])
    return _nested(get_args(hint)[0]) if get_origin(hint) is tuple else None


def _nested(hint: Any) -> type[msgspec.Struct] | None:
    origin = get_origin(hint)
    if origin is typing.Annotated:
        return _nested(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return next((found for part in get_args(hint) if (found := _nested(part))), None)
    if origin is Literal:
        return None
    return hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None
