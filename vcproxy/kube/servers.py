"""The `server:` of a kubeconfig, brought into the one form that every HTTP client reads alike.

URL parsers disagree, and each disagreement is a way around an allowlist. So the URL is not parsed in general: it must
match one narrow pattern, and what comes out is built anew from the parts. Two things of real life are mended on the
way: VirtualCluster's kubeconfig writer puts host *names* into brackets (`https://[apiserver-svc.ns]:6443`, which
current parsers refuse, CVE-2025-47912 in Go's), and a trailing slash.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NoReturn

from vcproxy.kube.errors import KubeconfigError, printable

_SERVER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    r"(?:\[(?P<bracketed>[^\[\]/?#@\\]*)\]|(?P<plain>[^\[\]/?#@:\\]*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<prefix>(?:/[A-Za-z0-9._~-]*)*)"
)
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")


def is_host_name(text: str) -> bool:
    """Whether `text` is a DNS name or an IP address.

    A name whose last label is a number is neither: C libraries read `127.1`, `0x7f.0.0.1` and `2130706433` as
    addresses.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        labels = text.removesuffix(".").split(".")
        return (
            len(text) <= 253
            and all(_LABEL.fullmatch(label) for label in labels)
            and not re.fullmatch(r"[0-9]+|0[xX][0-9A-Fa-f]*", labels[-1])
        )
    return "%" not in text  # an IPv6 zone names an interface of this machine


def normalise_server(server: str) -> str:
    """`https://HOST:PORT[/PREFIX]` of a kubeconfig's `server:`; brackets around IPv6 addresses and nothing else.

    Raises KubeconfigError for any other scheme, user names, queries, fragments, and hosts that are neither names nor
    addresses.
    """
    match = _SERVER.fullmatch(server)
    if match is None:
        _refuse("has user name, query, fragment or odd characters" if server else "is missing")
    if match["scheme"].lower() != "https":
        _refuse(f"{printable(match['scheme'], 16)}:// is refused")
    host = (match["plain"] if match["bracketed"] is None else match["bracketed"]).lower()
    port = int(match["port"] or 443)
    if not is_host_name(host):
        _refuse("its host is neither a DNS name nor an IP address")
    if not 0 < port < 65536:
        _refuse("its port is not between 1 and 65535")
    prefix = match["prefix"].rstrip("/")
    if any(part in (".", "..") for part in prefix.split("/")):
        _refuse("its path leads upwards")
    return f"https://[{host}]:{port}{prefix}" if ":" in host else f"https://{host}:{port}{prefix}"


def _refuse(reason: str) -> NoReturn:
    raise KubeconfigError("cluster.server", reason, cure="write `https://HOST:PORT`")
