"""Any model, as hypothesis draws it: few names, so that draws meet and changes are changes of the same port."""

from hypothesis import strategies as st

from vcproxy.model.addresses import Prefix
from vcproxy.model.endpoints import Endpoint, HintSet, pack
from vcproxy.model.services import Frontend, FrontendKind, PortKey, Protocol, ServicePort
from vcproxy.model.tenant import TenantModel

keys = st.builds(
    PortKey,
    st.sampled_from(["default", "kube-system"]),
    st.sampled_from(["web", "dns", "a.b-c", "x" * 63]),
    st.sampled_from(["", "http"]),
    st.sampled_from(list(Protocol)),
)
_address = st.integers(1, 40).map(lambda n: bytes((10, 1, 0, n))) | st.integers(1, 40).map(
    lambda n: bytes(15) + bytes([n])
)
_hints = st.builds(
    HintSet,
    st.sets(st.integers(1, 2**64 - 1), min_size=1, max_size=2).map(lambda ids: tuple(sorted(ids))),
    st.sets(st.integers(1, 3), max_size=2).map(lambda ids: tuple(sorted(ids))),
)
_endpoints = st.lists(
    st.builds(
        Endpoint, _address, st.integers(1, 65535), st.integers(0, 7), st.integers(0, 2**64 - 1), st.none() | _hints
    ),
    max_size=12,
)
_node_port = st.builds(
    Frontend, st.just(FrontendKind.NODE_PORT), st.sampled_from([bytes(4), bytes(16)]), st.integers(1, 65535)
)
_frontend = _node_port | st.builds(
    Frontend,
    st.sampled_from([FrontendKind.CLUSTER_IP, FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER]),
    _address,
    st.integers(1, 65535),
)
_prefix = st.sampled_from(
    [Prefix(b"\x0a\0\0\0", 8), Prefix(bytes(4), 0), Prefix(bytes(16), 0), Prefix(b"\xc0\0\2\1", 32)]
)


@st.composite
def _port(draw: st.DrawFn) -> ServicePort:
    endpoints4, endpoints6, hint_sets = pack(draw(_endpoints))
    external_local = draw(st.booleans())
    return ServicePort(
        key=draw(keys),
        frontends=tuple(sorted(set(draw(st.lists(_frontend, max_size=4))))),
        internal_local=draw(st.booleans()),
        external_local=external_local,
        affinity_seconds=draw(st.sampled_from([0, 1, 86400])),
        source_ranges=tuple(sorted(draw(st.sets(_prefix)))),
        hint_sets=hint_sets,
        endpoints4=endpoints4,
        endpoints6=endpoints6,
        health_check_node_port=draw(st.sampled_from([0, 1, 30081, 65535])) if external_local else 0,
    )


ports = _port()
models = st.lists(ports, max_size=10).map(TenantModel)
