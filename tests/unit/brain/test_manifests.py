"""Manifest files: what they hold, and errors that name file, line and field."""

from __future__ import annotations

import pytest

from vcproxy.brain.sources.manifests import ManifestError, parse_manifest
from vcproxy.kube import shapes

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: web
  creationTimestamp: 2020-01-01T00:00:00Z
spec:
  clusterIP: 10.96.0.1
  ports:
  - name: http
    port: 80
    targetPort: 8080
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-1
  namespace: shop
  labels: {kubernetes.io/service-name: web}
addressType: IPv4
endpoints:
- addresses: [10.0.0.1]
  conditions: {ready: true}
  nodeName: n1
  zone:
ports:
- {port: 8080, protocol: TCP}
"""


def keys(text: str) -> list[tuple[str, tuple[str, str]]]:
    return list(parse_manifest(text, "f.yaml").objects)


def test_documents_and_what_an_api_server_would_fill_in() -> None:
    found = parse_manifest(f"# nothing\n---\n{SERVICE}---\n{SLICE}---\n", "f.yaml").objects
    service = found["Service", ("default", "web")]
    assert isinstance(service, shapes.Service)
    assert service.spec.cluster_ips == ("10.96.0.1",)
    endpoint_slice = found["EndpointSlice", ("shop", "web-1")]
    assert isinstance(endpoint_slice, shapes.EndpointSlice)
    assert endpoint_slice.ports is not None
    assert endpoint_slice.ports[0].name == ""


def test_json_and_lists() -> None:
    node = '{"kind": "Node", "metadata": {"name": "n1"}}'
    assert keys('{"apiVersion": "v1", "kind": "List", "items": [' + node + "]}") == [("Node", ("", "n1"))]
    assert keys('{"kind": "NodeList", "items": [{"metadata": {"name": "n1"}}]}') == [("Node", ("", "n1"))]
    assert keys("kind: List\nitems: []\n") == []


def test_families_of_cluster_ips_are_filled_in() -> None:
    text = SERVICE.replace("clusterIP: 10.96.0.1", 'clusterIPs: ["fd00::1", 10.96.0.1]')
    (service,) = parse_manifest(text, "f.yaml").objects.values()
    assert isinstance(service, shapes.Service)
    assert (service.spec.cluster_ip, service.spec.ip_families) == ("fd00::1", ("IPv6", "IPv4"))


@pytest.mark.parametrize("value", ["None", '"None"'])
def test_headless_is_said_not_forgotten(value: str) -> None:
    (service,) = parse_manifest(SERVICE.replace("10.96.0.1", value), "f.yaml").objects.values()
    assert isinstance(service, shapes.Service)
    assert service.spec.cluster_ip == "None"


def test_a_kind_that_is_not_read_is_noted() -> None:
    found = parse_manifest(f"{SERVICE}---\nkind: Deployment\nmetadata: {{name: web}}\n", "f.yaml")
    assert list(found.objects) == [("Service", ("default", "web"))]
    assert found.notes == (
        "f.yaml:13: kind: Deployment is not read here: only Service, EndpointSlice, ServiceCIDR, Pod, Node and List",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: is empty"),
        ("# only words\n", "f.yaml: is empty"),
        ("---\n---\n", "f.yaml: is empty"),
        ("kind: [\n", "f.yaml:2: not YAML"),
        (SERVICE + "  x: {\n", "f.yaml:13: not YAML"),
        ("- 1\n", "f.yaml:1: expected a Kubernetes object"),
        (SERVICE + "---\n3\n", "f.yaml:13: expected a Kubernetes object"),
        (SERVICE.replace("port: 80\n", "port: eighty\n"), "f.yaml:10: spec.ports[0].port: Expected `int`, got `str`"),
        (SERVICE.replace("port: 80\n", "port: 70000\n"), "f.yaml:10: spec.ports[0].port: Expected `int` <= 65535"),
        (SERVICE.replace("  clusterIP: 10.96.0.1\n", ""), "f.yaml:6: spec.clusterIP: is missing"),
        (SERVICE.replace("v1", "v2"), "f.yaml:1: apiVersion: Service is read from v1, not v2"),
        (f"{SERVICE}---\n{SLICE}".replace("[10.0.0.1]", "10.0.0.1"), "f.yaml:21: endpoints[0].addresses: Expected"),
        (f"{SERVICE}---\n{SERVICE}", "f.yaml:16: metadata.name: Service default/web appears twice"),
        ("kind: Node\nmetadata: {}\n", "f.yaml:2: metadata: Object missing required field `name`"),
        (
            "kind: List\nitems:\n- kind: Node\n  metadata: {name: a}\n- kind: Node\n  metadata: {name: 5}\n",
            "f.yaml:6: metadata.name: Expected `str`, got `int`",
        ),
        ("a: &a [1]\nb: *x\n", "f.yaml:2: not YAML"),
    ],
)
def test_errors_name_file_line_and_field(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, "f.yaml")
    assert str(caught.value).startswith(message)
