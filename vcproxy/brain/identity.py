"""Who a peer is: the node that its client certificate names.

A node's certificate looks as a kubelet's does: common name `system:node:NAME`, organization `system:nodes`. No other
form is accepted. A cluster's CA signs certificates for people and programs too, with any plain common name they asked
for, but only its kubelet signer gives out this pair (kube-apiserver's NodeRestriction relies on the same), so that CA
may be the brain's client CA; and where it is another, cert-manager or `openssl` can write these two fields as well.
"""

import re
from collections.abc import Iterable, Mapping

from cryptography import x509
from cryptography.x509.oid import NameOID

NODE_PREFIX = "system:node:"
NODES_ORGANIZATION = "system:nodes"

# RFC 1123 subdomain, as Kubernetes demands of node names.
_NODE_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")

AuthContext = Mapping[str, Iterable[bytes]]


class NotANode(Exception):
    """The peer's certificate does not name a node; the text says what it lacks."""


def node_of_peer(context: AuthContext) -> str:
    """The node's name, from gRPC's auth context of a peer whose certificate chain was verified. Raises NotANode."""
    pems = list(context.get("x509_pem_cert", ()))
    if not pems:
        raise NotANode("the connection has no client certificate; connect over TLS with the node's certificate")
    return node_of_certificate(pems[0])


def node_of_certificate(pem: bytes) -> str:
    """The node's name in a certificate. Raises NotANode."""
    try:
        subject = x509.load_pem_x509_certificate(pem).subject
    except ValueError as error:
        raise NotANode(f"the client certificate cannot be read: {error}") from None
    names = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    organizations = [str(attribute.value) for attribute in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    if len(names) != 1 or not names[0].startswith(NODE_PREFIX) or NODES_ORGANIZATION not in organizations:
        raise NotANode(
            f"the client certificate names no node: it needs common name {NODE_PREFIX}NAME and "
            f"organization {NODES_ORGANIZATION}, and has {subject.rfc4514_string()[:256]!r}"
        )
    name = names[0].removeprefix(NODE_PREFIX)
    if not _NODE_NAME.fullmatch(name):
        raise NotANode(f"the client certificate names {name[:64]!r}, which is not a node name (RFC 1123)")
    return name
