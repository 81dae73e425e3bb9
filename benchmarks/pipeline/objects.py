"""Services and EndpointSlices as an API server would send them, with what a proxy reads and no more."""

from collections.abc import Iterator
from typing import Any


def pairs(services: int, endpoints: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A Service and its slice, as an API server would send them."""
    for number in range(services):
        name, vip = f"svc-{number}", f"10.{32 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        yield service(name, vip), endpoint_slice(name, [endpoint(number, index) for index in range(endpoints)])


def service(name: str, vip: str) -> dict[str, Any]:
    """A ClusterIP Service with one TCP port."""
    return {
        "metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80}],
        },
    }


def endpoint(number: int, index: int) -> dict[str, Any]:
    """One ready endpoint."""
    host = number * 16 + index
    return {
        "addresses": [f"10.{128 + (host >> 16 & 63)}.{host >> 8 & 255}.{host & 255}"],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{host % 100}",
    }


def endpoint_slice(owner: str, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """The Service's only slice."""
    return {
        "metadata": {
            "name": f"{owner}-x",
            "namespace": "default",
            "uid": f"{owner}-x",
            "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": owner},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": endpoints,
    }
