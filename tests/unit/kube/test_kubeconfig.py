"""What a kubeconfig may hold, and what is refused by name."""

from __future__ import annotations

import base64
import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vcproxy.kube.errors import KubeconfigError
from vcproxy.kube.kubeconfig import Credentials, in_cluster, load_kubeconfig, load_kubeconfig_file
from vcproxy.kube.servers import normalise_server


@functools.cache
def pems() -> tuple[bytes, bytes, bytes]:
    """(CA, client certificate, client key)."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    identity = authority.issue_cert("admin@acme")
    return authority.cert_pem.bytes(), identity.cert_chain_pems[0].bytes(), identity.private_key_pem.bytes()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def config(*, cluster: dict[str, Any] | None = None, user: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """A kubeconfig that is accepted, with fields changed; None removes a field."""
    ca, cert, key = pems()
    clusters = {"server": "https://10.0.0.1:6443", "certificate-authority-data": b64(ca), **(cluster or {})}
    users = {"client-certificate-data": b64(cert), "client-key-data": b64(key), **(user or {})}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {k: v for k, v in clusters.items() if v is not None}}],
        "users": [{"name": "u", "user": {k: v for k, v in users.items() if v is not None}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "ignored"}}],
        "current-context": "x",
        "preferences": {},
        **top,
    }
    return {k: v for k, v in document.items() if v is not None}


def load(document: Any, **options: Any) -> Credentials:
    return load_kubeconfig(yaml.safe_dump(document).encode(), **options)


@pytest.mark.parametrize(
    "encode",
    [
        lambda document: yaml.safe_dump(document).encode(),
        lambda document: b"\n" + yaml.safe_dump(document).encode(),
        lambda document: b"---\n" + yaml.safe_dump(document, default_flow_style=True).encode(),
        lambda document: json.dumps(document).encode(),
        lambda document: json.dumps(document, indent="\t").encode(),
    ],
    ids=["YAML", "leading newline, as VirtualCluster writes", "YAML flow", "JSON", "JSON with tabs"],
)
def test_inline_credentials_are_read(encode: Any) -> None:
    ca, cert, key = pems()
    expected = Credentials(server="https://10.0.0.1:6443", ca_pem=ca, client_cert_pem=cert, client_key_pem=key)
    assert load_kubeconfig(encode(config())) == expected


def test_token_and_tls_server_name() -> None:
    token_only = {"client-certificate-data": None, "client-key-data": None, "token": "abc.DEF-1"}
    loaded = load(config(user=token_only, cluster={"tls-server-name": "kubernetes.default"}))
    assert (loaded.token, loaded.tls_server_name, loaded.client_cert_pem) == ("abc.DEF-1", "kubernetes.default", b"")


def test_current_context_decides_and_other_users_do_not_matter() -> None:
    document = config()
    document["users"].insert(0, {"name": "evil", "user": {"exec": {"command": "/bin/false"}}})
    document["contexts"].insert(0, {"name": "evil", "context": {"cluster": "c", "user": "evil"}})
    assert load(document).server == "https://10.0.0.1:6443"
    document["current-context"] = "evil"
    with pytest.raises(KubeconfigError, match=r"user\.exec: would run a program"):
        load(document)


def test_values_that_go_writes_for_unset_fields_are_no_offence() -> None:
    unset = {"insecure-skip-tls-verify": False, "proxy-url": "", "certificate-authority": "", "extensions": []}
    load(config(cluster=unset, user={"tokenFile": "", "as-groups": [], "exec": None, "username": ""}))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("exec", {"user": {"exec": {"command": "id"}}}, "user.exec"),
    ("auth provider", {"user": {"auth-provider": {"name": "gcp"}}}, "user.auth-provider"),
    ("token file", {"user": {"tokenFile": "/etc/hostname"}}, "user.tokenFile"),
    ("token file by the name of a boolean", {"user": {"tokenFile": "false"}}, "user.tokenFile"),
    ("client certificate file", {"user": {"client-certificate": "/x"}}, "user.client-certificate"),
    ("client key file", {"user": {"client-key": "/x"}}, "user.client-key"),
    ("CA file", {"cluster": {"certificate-authority": "/x"}}, "cluster.certificate-authority"),
    ("proxy", {"cluster": {"proxy-url": "http://169.254.169.254"}}, "cluster.proxy-url"),
    ("no TLS verification", {"cluster": {"insecure-skip-tls-verify": True}}, "cluster.insecure-skip-tls-verify"),
    ("impersonation", {"user": {"as": "root"}}, "user.as"),
    ("impersonated groups", {"user": {"as-groups": ["system:masters"]}}, "user.as-groups"),
    ("impersonated uid", {"user": {"as-uid": "0"}}, "user.as-uid"),
    ("impersonated extra", {"user": {"as-user-extra": {"a": ["b"]}}}, "user.as-user-extra"),
    ("user name", {"user": {"username": "admin"}}, "user.username"),
    ("password", {"user": {"password": "hunter2"}}, "user.password"),
    ("unknown field of user", {"user": {"execv2": "x"}}, "user.execv2"),
    ("unknown field of cluster", {"cluster": {"socks": "x"}}, "cluster.socks"),
    ("plain http", {"cluster": {"server": "http://10.0.0.1"}}, "cluster.server"),
    ("no server", {"cluster": {"server": None}}, "cluster.server"),
    ("no CA", {"cluster": {"certificate-authority-data": None}}, "cluster.certificate-authority-data"),
    ("CA is no base64", {"cluster": {"certificate-authority-data": "%%%"}}, "cluster.certificate-authority-data"),
    ("CA is no PEM", {"cluster": {"certificate-authority-data": b64(b"x")}}, "cluster.certificate-authority-data"),
    ("odd tls-server-name", {"cluster": {"tls-server-name": "a b"}}, "cluster.tls-server-name"),
    ("certificate without key", {"user": {"client-key-data": None}}, "user.client-key-data"),
    ("key without certificate", {"user": {"client-certificate-data": None}}, "user.client-certificate-data"),
    ("key is no PEM", {"user": {"client-key-data": b64(b"x")}}, "user.client-key-data"),
    (
        "encrypted key",
        {"user": {"client-key-data": b64(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")}},
        "user.client-key-data",
    ),
    ("no credential", {"user": {"client-key-data": None, "client-certificate-data": None}}, "user"),
    ("token that splits the header", {"user": {"token": "a\r\nHost: b"}}, "user.token"),
    ("number as token is text, list is not", {"user": {"token": ["a"]}}, "user.token"),
    ("no such context", {"current-context": "y"}, "contexts"),
    ("no such user", {"users": []}, "users"),
    ("no contexts", {"contexts": None, "current-context": None}, "current-context"),
    ("contexts is a mapping", {"contexts": {"a": "b"}}, "contexts"),
]


@pytest.mark.parametrize(("change", "field"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_with_the_field_and_a_cure(change: dict[str, Any], field: str) -> None:
    with pytest.raises(KubeconfigError) as caught:
        load(config(**change))
    assert caught.value.field == field
    assert caught.value.cure
    assert "hunter2" not in str(caught.value) and "\r" not in str(caught.value)


DOCUMENTS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("null", b"null"),
    ("text", b"hello"),
    ("a list", b"- a\n- b\n"),
    ("not UTF-8", b"\xff\xfe\x00"),
    ("two documents", b"a: b\n---\nc: d\n"),
    ("alias bomb", b"a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n"),
    ("anchor on a mapping", b"a: &x {b: c}\n"),
    ("alias of nothing", b"a: *x\n"),
    ("python tag", b"a: !!python/object/apply:os.system [id]\n"),
    ("tag on a scalar", b"a: !!binary aGk=\n"),
    ("key twice", b"a: b\na: c\n"),
    ("key is a list", b"? [a]\n: b\n"),
    ("too large", b"a: " + b"x" * (1 << 20)),
    ("too many nodes", b"a: [" + b"x," * 100_000 + b"x]"),
    ("deep YAML sequences", b"[" * 500_000),
    ("deep YAML mappings", b"{a: " * 200_000),
    ("deep block sequences", b"- " * 500_000),
    ("deep explicit keys", b"? " * 500_000),
    ("deep JSON", b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    ("JSON within the parser's depth", b'{"a":' * 100 + b"1" + b"}" * 100),
]


@pytest.mark.parametrize("data", [case[1] for case in DOCUMENTS], ids=[case[0] for case in DOCUMENTS])
def test_hostile_documents_are_refused_quickly(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(KubeconfigError):
        load_kubeconfig(data)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("https://10.0.0.1:6443", "https://10.0.0.1:6443"),
        ("https://api.example.com", "https://api.example.com:443"),
        ("HTTPS://API.example.com:6443/", "https://api.example.com:6443"),
        ("https://[apiserver-svc.default-00f8c5-np]:6443", "https://apiserver-svc.default-00f8c5-np:6443"),
        ("https://[10.0.0.1]:6443", "https://10.0.0.1:6443"),
        ("https://[2001:db8::1]:6443", "https://[2001:db8::1]:6443"),
        ("https://rancher.example.com/k8s/clusters/c-m-1/", "https://rancher.example.com:443/k8s/clusters/c-m-1"),
    ],
)
def test_server_is_normalised(server: str, expected: str) -> None:
    assert normalise_server(server) == expected


@pytest.mark.parametrize(
    "server",
    [
        "",
        "10.0.0.1:6443",
        "http://10.0.0.1",
        "unix:///run/x",
        "https://",
        "https://user@host",
        "https://user:pw@host",
        "https://host?x",
        "https://host#x",
        "https://host\\@evil",
        "https://a b",
        "https://host:0",
        "https://host:65536",
        "https://host:",
        "https://host:6443:6443",
        "https://host/../..",
        "https://host/%2e%2e/",
        "https://[fe80::1%eth0]:6443",
        "https://[::1",
        "https://2001:db8::1",
        "https://2130706433",
        "https://127.1",
        "https://0x7f.0.0.0x1",
        "https://10.0.0.1\n",
        "https://xn--\u00fc.example",
        "https://-a",
        "https://" + "a" * 64,
        "https://" + "a." * 200 + "b",
    ],
)
def test_server_is_refused(server: str) -> None:
    with pytest.raises(KubeconfigError, match=r"cluster\.server"):
        normalise_server(server)


def test_the_operators_own_kubeconfig_may_name_files(tmp_path: Path) -> None:
    ca, cert, key = pems()
    for name, content in (("ca.crt", ca), ("tls.crt", cert), ("tls.key", key), ("token", b"abc\n")):
        (tmp_path / name).write_bytes(content)
    names = {"client-certificate": "tls.crt", "client-key": str(tmp_path / "tls.key"), "tokenFile": "token"}
    inline: dict[str, Any] = {"client-certificate-data": None, "client-key-data": None}
    document = config(
        cluster={"certificate-authority-data": None, "certificate-authority": "ca.crt"}, user=inline | names
    )
    (tmp_path / "config").write_text(yaml.safe_dump(document))
    loaded = load_kubeconfig_file(tmp_path / "config")
    assert (loaded.ca_pem, loaded.client_cert_pem, loaded.client_key_pem) == (ca, cert, key)
    assert (loaded.token, loaded.token_file) == ("", str(tmp_path / "token"))


def test_the_operators_own_kubeconfig_may_still_not_run_programs() -> None:
    with pytest.raises(KubeconfigError, match=r"user\.exec"):
        load(config(user={"exec": {"command": "aws"}}), trusted=True)


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for path in ("/dev/zero", str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(KubeconfigError, match=r"cluster\.certificate-authority"):
            load(config(cluster={"certificate-authority-data": None, "certificate-authority": path}), trusted=True)


def test_in_cluster(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(pems()[0])
    (tmp_path / "token").write_text("t0ken\n")
    environ = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    loaded = in_cluster(environ=environ, folder=tmp_path)
    assert (loaded.server, loaded.token_file) == ("https://[fd00::1]:6443", str(tmp_path / "token"))
    with pytest.raises(KubeconfigError, match="not a pod"):
        in_cluster(environ={}, folder=tmp_path)


def test_repr_shows_no_secret() -> None:
    loaded = load(config(user={"token": "very-secret"}))
    text = f"{loaded} {loaded!r} {[loaded]}"
    assert "https://10.0.0.1:6443" in text
    assert "very-secret" not in text and "PRIVATE" not in text and "BEGIN" not in text


WORDS = [
    "a",
    "&x ",
    "*x",
    "!!int ",
    "- ",
    "? ",
    ": ",
    "\n",
    "  ",
    "{",
    "}",
    "[",
    "]",
    ",",
    '"',
    "'",
    "|",
    "%",
    "---",
    "#",
    "\t",
    "\x00",
    "\u2028",
]
FIELDS = [
    "clusters: ",
    "users: ",
    "contexts: ",
    "current-context: ",
    "name: a",
    "cluster: ",
    "user: ",
    "server: https://a",
]


@given(st.lists(st.sampled_from(WORDS + FIELDS) | st.text(max_size=4), max_size=30).map("".join))
def test_no_text_raises_anything_but_a_kubeconfig_error(text: str) -> None:
    with pytest.raises(KubeconfigError):
        load_kubeconfig(text.encode("utf-8", "surrogatepass"))
