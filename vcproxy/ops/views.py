"""Rows that `get` shows, made from a tenant model: the same for brain and node, since both hold the same model."""

from collections.abc import Iterator, Mapping
from typing import Any

from vcproxy.model import endpoints
from vcproxy.model.addresses import format_address, format_target
from vcproxy.model.services import FrontendKind, ServicePort
from vcproxy.model.tenant import TenantModel

Row = Mapping[str, Any]

_FLAGS = ((endpoints.READY, "ready"), (endpoints.SERVING, "serving"), (endpoints.TERMINATING, "terminating"))


def port_row(tenant: str, port: ServicePort) -> Row:
    """One service port: what `get services` shows."""
    return {
        "tenant": tenant,
        "namespace": port.key.namespace,
        "service": port.key.service,
        "port": port.key.port,
        "protocol": port.key.protocol.name,
        "frontends": [_frontend(kind, address, number) for kind, address, number in _frontends(port)],
        "endpoints": count(port),
        "internalTrafficPolicy": "Local" if port.internal_local else "Cluster",
        "externalTrafficPolicy": "Local" if port.external_local else "Cluster",
        "affinitySeconds": port.affinity_seconds or None,
        "healthCheckNodePort": port.health_check_node_port or None,
    }


def count(port: ServicePort) -> int:
    """Endpoints of both families."""
    return len(port.endpoints4) // endpoints.ENDPOINT4.itemsize + len(port.endpoints6) // endpoints.ENDPOINT6.itemsize


def service_rows(tenant: str, model: TenantModel) -> list[Row]:
    """Every service port, sorted."""
    return [port_row(tenant, port) for port in _sorted(model)]


def frontend_rows(tenant: str, model: TenantModel) -> list[Row]:
    """Every address a client may dial."""
    return [
        {"tenant": tenant, "frontend": _frontend(kind, address, number), "kind": kind.name, **_owner(port)}
        for port in _sorted(model)
        for kind, address, number in _frontends(port)
    ]


def endpoint_rows(tenant: str, model: TenantModel, nodes: Mapping[int, str]) -> list[Row]:
    """Every endpoint. `nodes`: names by id; the id stands, in hex, where the name is not known."""
    rows: list[Row] = []
    for port in _sorted(model):
        for family, packed in ((4, port.endpoints4), (6, port.endpoints6)):
            for endpoint in endpoints.unpack(packed, family, port.hint_sets):
                rows.append(
                    {
                        "tenant": tenant,
                        **_owner(port),
                        "endpoint": format_target(endpoint.address, endpoint.port),
                        "node": nodes.get(endpoint.node) or (f"{endpoint.node:016x}" if endpoint.node else None),
                        "conditions": [name for flag, name in _FLAGS if endpoint.flags & flag],
                        "hinted": endpoint.hints is not None,
                    }
                )
    return rows


def _sorted(model: TenantModel) -> list[ServicePort]:
    return sorted(model, key=lambda port: port.key)


def _owner(port: ServicePort) -> Row:
    key = port.key
    return {"namespace": key.namespace, "service": key.service, "port": key.port, "protocol": key.protocol.name}


def _frontends(port: ServicePort) -> Iterator[tuple[FrontendKind, bytes, int]]:
    for frontend in port.frontends:
        yield FrontendKind(frontend.kind), frontend.address, frontend.port


def _frontend(kind: FrontendKind, address: bytes, number: int) -> str:
    if kind is FrontendKind.NODE_PORT:
        return f"*:{number}" if len(address) == 4 else f"[*]:{number}"
    return format_target(address, number)


def address_rows(addresses: Mapping[bytes, str]) -> list[Row]:
    """Pod addresses with their tenants."""
    return [{"address": format_address(address), "tenant": uid} for address, uid in sorted(addresses.items())]
