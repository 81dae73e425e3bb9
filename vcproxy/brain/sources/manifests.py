"""Kubernetes manifests in files: text to typed objects, or to errors that name file, line and field.

What an API server would have filled in is filled in here (namespace, clusterIPs, the empty port name), and what it
would never have accepted is refused, with the line. Nobody allocates ClusterIPs here, so a Service must name its own.

A file is a unit: either all of it can be used or nothing, so that half of a change is never in force.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import yaml

from vcproxy.brain.sources import Kind
from vcproxy.kube import shapes
from vcproxy.kube.errors import printable
from vcproxy.ops import positions

MAX_BYTES = 64 << 20
"""Largest manifest file, in bytes."""

Key = tuple[str, str]
Object = shapes.Service | shapes.EndpointSlice | shapes.ServiceCIDR | shapes.Pod | shapes.Node

_SHAPES: Mapping[Kind, tuple[str, type[Any]]] = {
    "Service": ("v1", shapes.Service),
    "EndpointSlice": ("discovery.k8s.io/v1", shapes.EndpointSlice),
    "ServiceCIDR": ("networking.k8s.io/v1", shapes.ServiceCIDR),
    "Pod": ("v1", shapes.Pod),
    "Node": ("v1", shapes.Node),
}
KINDS: tuple[Kind, ...] = ("Service", "EndpointSlice", "ServiceCIDR", "Pod", "Node")
_CLUSTER_SCOPED = ("ServiceCIDR", "Node")


class ManifestError(Exception):
    """A file that cannot be used. `line` counts from 1, 0 if unknown; `field` is an API path, "" for the whole."""

    def __init__(self, file: str, line: int, field: str, reason: str) -> None:
        self.file, self.line, self.field, self.reason = file, line, field, printable(reason)
        where = f"{file}:{line}" if line else file
        super().__init__(f"{where}: {field}: {self.reason}" if field else f"{where}: {self.reason}")


class Manifest(NamedTuple):
    """The objects of one file, and notes about what in it is of no use here."""

    objects: dict[tuple[Kind, Key], Object]
    notes: tuple[str, ...]


class _Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it (sigs.k8s.io/yaml): what JSON has not, such as dates, stays text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own declaration)


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?[0-9]+\.[0-9]+(?:[eE][-+]?[0-9]+)?", "-+0123456789"),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


def parse_manifest(text: str, file: str) -> Manifest:
    """All documents of a file; a List counts as its items. Raises ManifestError.

    Kinds that a proxy does not read are noted and skipped. A file without any document is an error: it is most likely
    being written.
    """
    objects: dict[tuple[Kind, Key], Object] = {}
    notes: list[str] = []
    documents = 0
    for value, node in _documents(text, file):
        documents += 1
        for item, path in _items(value):
            place = _Place(file, node, path)
            kind = item.get("kind")
            if kind not in KINDS:
                what = printable(str(kind), 64)
                notes.append(f"{file}:{place.line()}: kind: {what} is not read here: only {', '.join(KINDS)} and List")
                continue
            found = _typed(kind, item, place)
            if (kind, found.key) in objects:
                raise place.error("metadata.name", f"{kind} {'/'.join(found.key)} appears twice in this file")
            objects[kind, found.key] = found
    if not documents:
        raise ManifestError(file, 0, "", "is empty; delete the file to delete its objects")
    return Manifest(objects, tuple(notes))


class _Place(NamedTuple):
    """Where an object stands: what an error needs to name its line."""

    file: str
    document: yaml.Node
    path: tuple[str | int, ...]

    def line(self, *steps: str | int) -> int:
        """The line of a field of the object."""
        return positions.line(self.document, (*self.path, *steps)) or self.document.start_mark.line + 1

    def error(self, field: str, reason: str) -> ManifestError:
        """An error about a field in msgspec's or the API's spelling: `spec.ports[0].port`."""
        return ManifestError(self.file, self.line(*positions.steps(field)), field, reason)


def _documents(text: str, file: str) -> Iterator[tuple[Any, yaml.Node]]:
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                return
            value = loader.construct_document(node)
            if value is not None:
                if not isinstance(value, dict):
                    raise ManifestError(file, node.start_mark.line + 1, "", "expected a Kubernetes object")
                yield value, node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise ManifestError(file, mark.line + 1 if mark else 0, "", f"not YAML: {problem}") from None
    except (RecursionError, ValueError) as error:
        raise ManifestError(file, 0, "", f"not YAML: {error}") from None
    finally:
        loader.dispose()


def _items(value: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[str | int, ...]]]:
    """The objects of a document: itself, or a List's items."""
    items = value.get("items")
    kind = value.get("kind")
    if isinstance(kind, str) and kind.endswith("List") and isinstance(items, list):
        for position, item in enumerate(items):
            if isinstance(item, dict):
                item = {"kind": kind.removesuffix("List"), **item} if kind != "List" else item
                yield item, ("items", position)
    else:
        yield value, ()


def _typed(kind: Kind, item: dict[str, Any], place: _Place) -> Object:
    version, shape = _SHAPES[kind]
    said = item.get("apiVersion", version)
    if said != version:
        raise place.error("apiVersion", f"{kind} is read from {version}, not {said}")
    plain = _without_nulls(item)
    _default(kind, plain)
    try:
        found: Object = msgspec.convert(plain, shape, strict=True)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise place.error(path.rstrip("`").removeprefix("$").lstrip("."), message) from None
    if isinstance(found, shapes.Service) and not found.spec.cluster_ip and found.spec.type != "ExternalName":
        raise place.error("spec.clusterIP", 'is missing: nobody allocates one here; write an address, or "None"')
    return found


def _default(kind: Kind, item: dict[str, Any]) -> None:
    """What an API server would fill in before a proxy sees it."""
    metadata = item.get("metadata")
    if isinstance(metadata, dict) and kind not in _CLUSTER_SCOPED:
        metadata.setdefault("namespace", "default")
    spec = item.get("spec")
    if kind == "Service" and isinstance(spec, dict):
        addresses = spec.get("clusterIPs")
        if isinstance(addresses, list) and addresses:
            spec.setdefault("clusterIP", addresses[0])
            spec.setdefault("ipFamilies", ["IPv6" if ":" in str(text) else "IPv4" for text in addresses])
        elif spec.get("clusterIP"):
            spec["clusterIPs"] = [spec["clusterIP"]]
    if kind == "EndpointSlice":
        for port in item.get("ports") or ():
            if isinstance(port, dict):
                port.setdefault("name", "")


def _without_nulls(value: Any) -> Any:
    """A copy without nulls in mappings: Kubernetes reads `ports: null` as not said."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
