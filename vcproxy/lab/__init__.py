"""A small data centre inside this machine: nodes and pods as network namespaces, with real packets between them.

`vcproxy demo` shows the product in it, and the packet tests prove it there. Nothing outside its namespaces is touched,
and it builds in a fraction of a second. See `topology` for how to make one, `wiring` for how it is connected and why,
`dial` for clients, `server` for what pods answer.
"""

from vcproxy.lab.dial import (
    Broken,
    DialFailed,
    HttpReply,
    Outcome,
    Place,
    Refused,
    Reply,
    TcpSession,
    TimedOut,
    Unreachable,
    http_get,
    sctp_request,
    tcp_request,
    udp_request,
)
from vcproxy.lab.errors import LabError, LabUnavailable
from vcproxy.lab.topology import Client, Lab, Node, Pod, Tenant, require_root

__all__ = [
    "Broken",
    "Client",
    "DialFailed",
    "HttpReply",
    "Lab",
    "LabError",
    "LabUnavailable",
    "Node",
    "Outcome",
    "Place",
    "Pod",
    "Refused",
    "Reply",
    "TcpSession",
    "Tenant",
    "TimedOut",
    "Unreachable",
    "http_get",
    "require_root",
    "sctp_request",
    "tcp_request",
    "udp_request",
]
