"""Kubernetes JSON to shapes: what is read, what is skipped, what is an error of one object."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.kube.decode import (
    ENDPOINT_SLICES,
    NAMESPACES,
    NODES,
    PODS,
    SERVICE_CIDRS,
    SERVICES,
    Added,
    Bad,
    Bookmark,
    Page,
    Removed,
    Resource,
    decode_event,
    decode_list,
)
from vcproxy.kube.errors import ApiError, BadResponse, Forbidden, Gone

LIMIT = 1 << 20

SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {
        "name": "web",
        "namespace": "demo",
        "uid": "u-1",
        "resourceVersion": "41",
        "labels": {"service.kubernetes.io/headless": ""},
        "annotations": {
            "tenancy.x-k8s.io/cluster": "default-00f8c5-acme",
            "tenancy.x-k8s.io/uid": "t-1",
            "transparency.tenancy.x-k8s.io/clusterIP": "10.96.0.7",
            "kubectl.kubernetes.io/last-applied-configuration": "{" * 1000,
        },
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
    },
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.32.0.9",
        "clusterIPs": ["10.32.0.9", "fd00::9"],
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080, "targetPort": "web"}],
        "externalIPs": ["203.0.113.9"],
        "loadBalancerSourceRanges": ["203.0.113.0/25"],
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Cluster",
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 30}},
        "healthCheckNodePort": 30999,
        "selector": {"app": "web"},
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.1", "ipMode": "Proxy"}, {"hostname": "lb.example"}]}},
}
SLICE: dict[str, Any] = {
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "namespace": "demo", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "", "port": None}],
    "endpoints": [
        {
            "addresses": ["10.1.0.1"],
            "conditions": {"ready": False, "serving": True, "terminating": True},
            "nodeName": "node-1",
            "zone": "a",
            "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "node-1"}]},
            "targetRef": {"kind": "Pod", "namespace": "demo", "name": "web-x", "uid": "p-1"},
        },
        {"addresses": ["10.1.0.2"], "conditions": {"ready": True}},
    ],
}


def line(kind: str, value: Any) -> bytes:
    return json.dumps({"type": kind, "object": value}, separators=(",", ":")).encode()


def decoded(resource: Resource[Any], value: Any) -> Any:
    event = decode_event(resource, line("ADDED", value), tenant="acme", object_bytes=LIMIT)
    assert isinstance(event, Added), event
    return event.object


def listed(items: Any, *, kind: str = "ServiceList", limit: int = LIMIT) -> Page[Any]:
    body = json.dumps({"kind": kind, "metadata": {"resourceVersion": "7", "continue": "c"}, "items": items})
    return decode_list(SERVICES, body.encode(), tenant="acme", object_bytes=limit)


def test_service() -> None:
    service = decoded(SERVICES, SERVICE)
    spec = service.spec
    assert service.key == ("demo", "web")
    assert (service.metadata.uid, service.metadata.resource_version) == ("u-1", "41")
    assert service.metadata.labels == {"service.kubernetes.io/headless": ""}
    assert (service.metadata.annotations.cluster, service.metadata.annotations.uid) == ("default-00f8c5-acme", "t-1")
    assert service.metadata.annotations.super_cluster_ip == "10.96.0.7"
    assert (spec.type, spec.cluster_ip, spec.cluster_ips) == ("LoadBalancer", "10.32.0.9", ("10.32.0.9", "fd00::9"))
    assert spec.ip_families == ("IPv4", "IPv6")
    (port,) = spec.ports
    assert (port.name, port.port, port.protocol, port.node_port) == ("http", 80, "TCP", 30080)
    assert (spec.external_ips, spec.load_balancer_source_ranges) == (("203.0.113.9",), ("203.0.113.0/25",))
    assert (spec.external_traffic_policy, spec.internal_traffic_policy) == ("Local", "Cluster")
    assert (spec.session_affinity, spec.session_affinity_config.client_ip.timeout_seconds) == ("ClientIP", 30)
    assert spec.health_check_node_port == 30999
    first, second = service.status.load_balancer.ingress
    assert (first.ip, first.ip_mode, second.hostname, second.ip_mode) == ("198.51.100.1", "Proxy", "lb.example", None)


def test_endpoint_slice() -> None:
    slice_ = decoded(ENDPOINT_SLICES, SLICE)
    first, second = slice_.endpoints
    assert slice_.address_type == "IPv4" and slice_.metadata.labels["kubernetes.io/service-name"] == "web"
    assert [(port.name, port.port, port.protocol) for port in slice_.ports] == [("http", 8080, "TCP"), ("", None, None)]
    conditions = first.conditions
    assert (conditions.ready, conditions.serving, conditions.terminating) == (False, True, True)
    assert (first.addresses, first.node_name, first.zone) == (("10.1.0.1",), "node-1", "a")
    assert [zone.name for zone in first.hints.for_zones] == ["a", "b"]
    assert [node.name for node in first.hints.for_nodes] == ["node-1"]
    assert (first.target_ref.name, first.target_ref.uid) == ("web-x", "p-1")
    assert (second.conditions.serving, second.conditions.terminating) == (None, None), "not said is not false"
    assert (second.node_name, second.hints, second.target_ref) == (None, None, None)


def test_go_writes_empty_slices_as_null() -> None:
    slice_ = decoded(ENDPOINT_SLICES, {**SLICE, "endpoints": None, "ports": None})
    assert slice_.endpoints is None and slice_.ports is None
    assert listed(None).objects == ()


def test_pod_node_namespace_and_service_cidr() -> None:
    meta = {"name": "n", "uid": "u", "labels": {"topology.kubernetes.io/zone": "a"}, "annotations": {"net/vtep": "1.2"}}
    pod = decoded(
        PODS,
        {
            "kind": "Pod",
            "metadata": {**meta, "namespace": "x", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": "n1", "hostNetwork": True, "containers": [{"name": "c"}]},
            "status": {"phase": "Running", "podIP": "10.1.0.1", "podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]},
        },
    )
    assert (pod.spec.node_name, pod.spec.host_network, pod.status.phase) == ("n1", True, "Running")
    assert (pod.status.pod_ip, [ip.ip for ip in pod.status.pod_ips]) == ("10.1.0.1", ["10.1.0.1", "fd00::1"])
    assert pod.metadata.deletion_timestamp == "2026-01-01T00:00:00Z"
    addresses = [{"type": "InternalIP", "address": "192.0.2.1"}]
    node = decoded(NODES, {"metadata": meta, "spec": {"podCIDRs": ["10.1.0.0/24"]}, "status": {"addresses": addresses}})
    assert (node.key, node.spec.pod_cidrs, node.status.addresses[0].address) == (
        ("", "n"),
        ("10.1.0.0/24",),
        "192.0.2.1",
    )
    assert node.metadata.annotations == {"net/vtep": "1.2"}
    assert decoded(NAMESPACES, {"metadata": meta}).metadata.uid == "u"
    assert decoded(SERVICE_CIDRS, {"metadata": meta, "spec": {"cidrs": ["10.32.0.0/16"]}}).spec.cidrs == (
        "10.32.0.0/16",
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"spec": None}, "$.spec"),
        ({"spec": {**SERVICE["spec"], "ports": {}}}, "$.spec.ports"),
        ({"spec": {**SERVICE["spec"], "ports": [{"port": "80"}]}}, "$.spec.ports[0].port"),
        ({"spec": {**SERVICE["spec"], "ports": [{"port": 65536}]}}, "$.spec.ports[0].port"),
        ({"spec": {**SERVICE["spec"], "ports": [{"port": -1}]}}, "$.spec.ports[0].port"),
        ({"spec": {**SERVICE["spec"], "ports": [{"port": 80.5}]}}, "$.spec.ports[0].port"),
        ({"spec": {**SERVICE["spec"], "ports": [{"port": 10**400}]}}, "$.spec.ports[0].port"),
        ({"spec": {**SERVICE["spec"], "clusterIPs": [1]}}, "$.spec.clusterIPs[0]"),
        ({"status": []}, "$.status"),
        ({"metadata": {**SERVICE["metadata"], "labels": {"a": 1}}}, "$.metadata.labels[...]"),
        ({"metadata": {**SERVICE["metadata"], "uid": 1}}, "$.metadata.uid"),
    ],
)
def test_a_wrong_type_is_an_error_that_names_object_and_field(change: dict[str, Any], field: str) -> None:
    bad = {**SERVICE, **change}
    event = decode_event(SERVICES, line("MODIFIED", bad), tenant="acme", object_bytes=LIMIT)
    page = listed([SERVICE, bad, SERVICE])
    assert isinstance(event, Bad) and len(page.objects) == 2
    for error in (event.error, *page.errors):
        assert (error.tenant, error.kind, error.key, error.field) == ("acme", "Service", ("demo", "web"), field)
        assert str(error).startswith(f"tenant acme: Service demo/web: {field}: ")
    assert event.resource_version == "41"


@pytest.mark.parametrize(
    "metadata",
    [None, 7, [], {}, {"name": 7}, {"name": ""}, {"name": "a" * 254}, {"name": None}, {"name": "a", "namespace": 3}],
)
def test_an_object_whose_name_cannot_be_read(metadata: Any) -> None:
    page = listed([{**SERVICE, "metadata": metadata}, SERVICE])
    assert len(page.objects) == 1
    assert page.errors[0].field.startswith("$")
    if metadata != {"name": "a" * 254}:
        assert page.errors[0].key is None and "of unreadable name" in str(page.errors[0])


def test_an_object_over_the_limit_is_an_error_in_list_and_watch() -> None:
    huge = {**SERVICE, "spec": {**SERVICE["spec"], "externalName": "x" * 5000}}
    page = listed([huge, SERVICE], limit=4000)
    event = decode_event(SERVICES, line("ADDED", huge), tenant="acme", object_bytes=4000)
    assert len(page.objects) == 1 and isinstance(event, Bad)
    assert page.errors[0].key == event.error.key == ("demo", "web")
    assert "more than the limit of 4000" in event.error.reason


def test_page_has_version_and_next_token() -> None:
    page = listed([SERVICE])
    assert (page.resource_version, page.next_token, page.errors) == ("7", "c", ())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"<html></html>",
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"}}',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":""},"items":[]}',
        b'{"kind":"ServiceList","metadata":{},"items":[]}',
        b'{"kind":"PodList","metadata":{"resourceVersion":"1"},"items":[]}',
        b'{"metadata":{"resourceVersion":"1"},"items":[]}',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"},"items":{}}',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":1},"items":[]}',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"},"items":[]',
        b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"},"items":[' + b"[" * 50_000,
    ],
)
@pytest.mark.parametrize("limit", [LIMIT, 0], ids=["typed", "item by item"])
def test_what_is_not_this_list_is_a_bad_response(body: bytes, limit: int) -> None:
    with pytest.raises(BadResponse) as caught:
        decode_list(SERVICES, body, tenant="acme", object_bytes=limit)
    assert caught.value.path == SERVICES.path and len(str(caught.value)) < 500


def test_deep_json_within_one_object_costs_that_object_only() -> None:
    deep = b'{"metadata":{"name":"deep"},"spec":{},"x":' + b"[" * 900 + b"]" * 900 + b"}"
    deeper = deep.replace(b"[" * 900, b"[" * 100_000).replace(b"]" * 900, b"]" * 100_000)
    event = decode_event(SERVICES, b'{"type":"ADDED","object":' + deep + b"}", tenant="acme", object_bytes=LIMIT)
    assert isinstance(event, Added | Bad)
    with pytest.raises(BadResponse):
        decode_event(SERVICES, b'{"type":"ADDED","object":' + deeper + b"}", tenant="acme", object_bytes=LIMIT)


def test_invalid_utf8_costs_one_object() -> None:
    good = json.dumps(SERVICE).encode()
    bad = good.replace(b'"demo"', b'"\xff\xfe"')
    body = b'{"kind":"ServiceList","metadata":{"resourceVersion":"1"},"items":[%s,%s]}' % (bad, good)
    page = decode_list(SERVICES, body, tenant="acme", object_bytes=LIMIT)
    assert [item.key for item in page.objects] == [("demo", "web")] and len(page.errors) == 1


@pytest.mark.parametrize("spaces", [False, True], ids=["as Go writes it", "with spaces"])
def test_watch_events(spaces: bool) -> None:
    def event(kind: str, value: Any) -> Any:
        data = json.dumps({"object": value, "type": kind}).encode() if spaces else line(kind, value)
        return decode_event(SERVICES, data, tenant="acme", object_bytes=LIMIT)

    added = event("ADDED", SERVICE)
    assert isinstance(added, Added) and added.resource_version == "41"
    assert event("MODIFIED", SERVICE) == added
    assert event("DELETED", SERVICE) == Removed(("demo", "web"), "u-1", "41")
    assert event("DELETED", {**SERVICE, "spec": 7}) == Removed(("demo", "web"), "u-1", "41"), "unreadable, but gone"
    assert event("BOOKMARK", {"kind": "Service", "metadata": {"resourceVersion": "50"}}) == Bookmark(
        "50", "Service", False
    )


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"code": 410, "reason": "Expired", "message": "too old resource version"}, Gone),
        ({"code": 0, "reason": "Gone"}, Gone),
        ({"code": 403, "reason": "Forbidden"}, Forbidden),
        ({"code": "x"}, BadResponse),
        ([], BadResponse),
    ],
)
def test_error_events(status: Any, expected: type[ApiError]) -> None:
    with pytest.raises(expected):
        decode_event(SERVICES, line("ERROR", status), tenant="acme", object_bytes=LIMIT)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """`value` with anything at all in one place of it, or with that place gone."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        copy: Any = value.copy()
        at = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        if draw(st.booleans()):
            copy[at] = draw(mutated(value[at]))
        else:
            del copy[at]
        return copy
    return draw(ANY_JSON)


@given(mutated(SLICE), st.sampled_from(["ADDED", "MODIFIED", "DELETED", "BOOKMARK", "ERROR", ""]), st.integers(0, 2000))
def test_no_object_raises_anything_but_typed_errors(value: Any, kind: str, limit: int) -> None:
    body = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": "1"}, "items": [SLICE, value]}
    page = decode_list(ENDPOINT_SLICES, json.dumps(body).encode(), tenant="acme", object_bytes=limit)
    assert len(page.objects) + len(page.errors) == 2
    try:
        decode_event(ENDPOINT_SLICES, line(kind, value), tenant="acme", object_bytes=limit)
    except ApiError as error:
        assert str(error).isprintable()


@given(
    st.binary(max_size=40) | mutated({"type": "ADDED", "object": SLICE}).map(lambda value: json.dumps(value).encode())
)
def test_no_line_raises_anything_but_typed_errors(data: bytes) -> None:
    try:
        decode_event(ENDPOINT_SLICES, data, tenant="acme", object_bytes=LIMIT)
    except ApiError as error:
        assert str(error).isprintable()
