"""Objects as an API server stores them: Kubernetes' protobuf, of the fields that objects here have.

JSON is read too, several times as slowly. Numbers are those of generated.proto in k8s.io/api and k8s.io/apimachinery.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

Encode = Callable[[Any], bytes]
"""Makes a field, tag and all, of a value as JSON has it."""


def length_delimited(number: int, value: bytes) -> bytes:
    """A field of protobuf that holds octets."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


_SHORT = [bytes((value,)) for value in range(128)]


def _varint(value: int) -> bytes:
    if value < 128:
        return _SHORT[value]
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _text(number: int) -> Encode:
    tag = _varint(number << 3 | 2)

    def encode(value: str) -> bytes:
        octets = value.encode()
        return tag + _varint(len(octets)) + octets

    return encode


def _integer(number: int) -> Encode:
    """Booleans too."""
    tag = _varint(number << 3)
    return lambda value: tag + _varint(int(value))


def _list(of: Encode) -> Encode:
    return lambda values: b"".join(map(of, values))


def _map(number: int) -> Encode:
    key, held = _text(1), _text(2)
    return lambda pairs: b"".join(length_delimited(number, key(name) + held(value)) for name, value in pairs.items())


def _message(number: int, fields: Mapping[str, Encode]) -> Encode:
    return lambda value: length_delimited(number, _fields(fields, value))


def _fields(fields: Mapping[str, Encode], value: Mapping[str, Any]) -> bytes:
    """A KeyError for a field that is not known here: nothing is left out unseen."""
    return b"".join(fields[name](held) for name, held in value.items())


def _time(number: int) -> Encode:
    seconds = _integer(1)
    return lambda value: length_delimited(number, seconds(datetime.fromisoformat(value).timestamp()))


def _raw_json(number: int) -> Encode:
    """FieldsV1, whose only field is the JSON."""
    return lambda value: length_delimited(number, length_delimited(1, msgspec.json.encode(value)))


def _port_number(number: int) -> Encode:
    """IntOrString of a number: type 0, and the number in its second field."""
    return lambda value: length_delimited(number, _integer(2)(value))


_OWNER = {
    "kind": _text(1),
    "name": _text(3),
    "uid": _text(4),
    "apiVersion": _text(5),
    "controller": _integer(6),
    "blockOwnerDeletion": _integer(7),
}
_MANAGED = {
    "manager": _text(1),
    "operation": _text(2),
    "apiVersion": _text(3),
    "time": _time(4),
    "fieldsType": _text(6),
    "fieldsV1": _raw_json(7),
}
_METADATA = _message(
    1,
    {
        "name": _text(1),
        "generateName": _text(2),
        "namespace": _text(3),
        "uid": _text(5),
        "creationTimestamp": _time(8),
        "labels": _map(11),
        "annotations": _map(12),
        "ownerReferences": _list(_message(13, _OWNER)),
        "managedFields": _list(_message(17, _MANAGED)),
    },
)
_SERVICE_PORT = {"name": _text(1), "protocol": _text(2), "port": _integer(3), "targetPort": _port_number(4)}
_SERVICE_SPEC = {
    "ports": _list(_message(1, _SERVICE_PORT)),
    "selector": _map(2),
    "clusterIP": _text(3),
    "type": _text(4),
    "sessionAffinity": _text(7),
    "ipFamilyPolicy": _text(17),
    "clusterIPs": _list(_text(18)),
    "ipFamilies": _list(_text(19)),
    "internalTrafficPolicy": _text(22),
}
_ENDPOINT = {
    "addresses": _list(_text(1)),
    "conditions": _message(2, {"ready": _integer(1), "serving": _integer(2), "terminating": _integer(3)}),
    "targetRef": _message(4, {"kind": _text(1), "namespace": _text(2), "name": _text(3), "uid": _text(4)}),
    "nodeName": _text(6),
    "zone": _text(7),
}
_REFERENCE = {"group": _text(1), "resource": _text(2), "namespace": _text(3), "name": _text(4)}
_KINDS: Mapping[str, Mapping[str, Encode]] = {
    "Service": {"metadata": _METADATA, "spec": _message(2, _SERVICE_SPEC)},
    "EndpointSlice": {
        "metadata": _METADATA,
        "endpoints": _list(_message(2, _ENDPOINT)),
        "ports": _list(_message(3, {"name": _text(1), "protocol": _text(2), "port": _integer(3)})),
        "addressType": _text(4),
    },
    "IPAddress": {"metadata": _METADATA, "spec": _message(2, {"parentRef": _message(1, _REFERENCE)})},
}
_MAGIC = b"k8s\0"


def stored(found: Mapping[str, Any]) -> bytes:
    """An object, as JSON has it, in the form of storage: runtime.Unknown around its message."""
    body = {name: value for name, value in found.items() if name not in ("apiVersion", "kind")}
    kind = length_delimited(1, found["apiVersion"].encode()) + length_delimited(2, found["kind"].encode())
    return _MAGIC + length_delimited(1, kind) + length_delimited(2, _fields(_KINDS[found["kind"]], body))
