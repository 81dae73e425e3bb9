"""What a node is told about itself."""

import msgspec

from vcproxy.model.addresses import Prefix


class NodeFacts(msgspec.Struct, frozen=True):
    """Facts of one node of the super cluster: full state.

    `zone`: its topology.kubernetes.io/zone label, "" for none. `addresses`: of the Node object, 4 or 16 octets each,
    internal ones first; the first of a family is the node's primary address. `pod_ranges`: spec.podCIDRs of the node.
    `eligible`: load balancers may send here, that is, the Node is not on its way out (kube-proxy's nodeEligible,
    KEP-3836).
    """

    zone: str = ""
    addresses: tuple[bytes, ...] = ()
    pod_ranges: tuple[Prefix, ...] = ()
    eligible: bool = True
