"""Events in any order give what compiling everything anew gives, and cost what they touch."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.brain.kinds import endpoint_slice, service
from vcproxy.brain.compiler import Compiler, compile_service
from vcproxy.brain.guard import UNRESTRICTED, Limits, Reason, Unusable
from vcproxy.brain.slices import join, pack_slice
from vcproxy.brain.vouched import Alias, Aliases
from vcproxy.kube.errors import ShapeError
from vcproxy.model.addresses import format_address, parse_address
from vcproxy.model.endpoints import READY, SERVING, TERMINATING, Endpoint, HintSet, name_id, pack
from vcproxy.model.services import FrontendKind, Protocol
from vcproxy.model.tenant import TenantModel

# --- objects at random: few names, so that they meet ------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
ADDRESSES4 = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.1.0.0", "10.0.1.0", "127.0.0.1", "nonsense"])
ADDRESSES6 = st.sampled_from(["fd00::1", "fd00::2", "fd00:0:0:1::", "fe80::1"])
CONDITION = st.sampled_from([None, True, False])
HINTS = st.one_of(
    st.none(),
    st.builds(
        lambda zones, nodes: {
            "forZones": [{"name": zone} for zone in zones],
            "forNodes": [{"name": node} for node in nodes],
        },
        st.lists(st.sampled_from(["z1", "z2"]), max_size=2),
        st.lists(st.sampled_from(["n1", "n2"]), max_size=1),
    ),
)


def endpoints_of(addresses: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(
        {
            "addresses": st.lists(addresses, min_size=0, max_size=2),
            "conditions": st.fixed_dictionaries({"ready": CONDITION, "serving": CONDITION, "terminating": CONDITION}),
            "nodeName": st.sampled_from([None, "n1", "n2"]),
            "hints": HINTS,
        }
    )


@st.composite
def services(draw):
    spec = draw(
        st.sampled_from(
            [
                {},
                {"clusterIP": "fd00::1:1"},
                {"clusterIPs": ["10.96.0.2", "fd00::1:2"], "ipFamilies": ["IPv4", "IPv6"]},
                {"clusterIP": "None"},
                {"clusterIP": "nonsense"},
                {"sessionAffinity": "ClientIP"},
                {"externalIPs": ["192.0.2.7"]},
                {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000},
            ]
        )
    )
    listed = draw(st.lists(st.sampled_from(["", "http", "dns"]), unique=True, max_size=3))
    said = [{"name": name, "port": 80 + len(name), "protocol": "UDP" if name == "dns" else "TCP"} for name in listed]
    return service(draw(NAMES), ports=said, **spec)


@st.composite
def slices(draw):
    version6 = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(["", "http", "dns"]), unique=True, max_size=3))
    said = [
        {"name": name, "port": draw(st.sampled_from([80, 81])), "protocol": "UDP" if name == "dns" else "TCP"}
        for name in names
    ]
    return endpoint_slice(
        name=draw(st.sampled_from(["s1", "s2", "s3", "s4"])),
        service=draw(st.one_of(NAMES, st.none())),
        address_type="IPv6" if version6 else "IPv4",
        ports=said,
        endpoints=draw(st.lists(endpoints_of(ADDRESSES6 if version6 else ADDRESSES4), max_size=4)),
    )


EVENTS = st.one_of(
    services().map(lambda found: ("put", found)),
    slices().map(lambda found: ("put", found)),
    NAMES.map(lambda name: ("delete", ("Service", ("default", name)))),
    st.sampled_from(["s1", "s2", "s3", "s4"]).map(lambda name: ("delete", ("EndpointSlice", ("default", name)))),
    st.just(("flush", None)),
)


def usable(found) -> bool:
    try:
        compile_service(found, [], UNRESTRICTED)
    except Unusable:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=30))
def test_random_event_sequences_incremental_equals_full_recompile(events) -> None:
    compiler, model = Compiler(UNRESTRICTED), TenantModel()
    compiler.listed("Service")
    compiler.listed("EndpointSlice")
    held = {"Service": {}, "EndpointSlice": {}}
    for what, said in [*events, ("flush", None)]:
        if what == "put":
            compiler.put(said)
            if type(said).__name__ == "EndpointSlice" or usable(said):  # else: the last good form stays
                held[type(said).__name__][said.key] = said
        elif what == "delete":
            compiler.delete(*said)
            held[said[0]].pop(said[1], None)
        else:
            change = compiler.flush()
            assert not {port.key for port in change.put} & set(change.removed)
            for key in change.removed:
                assert model.remove(key), "only what was there is removed"
            for port in change.put:
                model.put(port)
    anew = [
        port
        for found in held["Service"].values()
        for port in compile_service(found, held["EndpointSlice"].values(), UNRESTRICTED).ports
    ]
    assert model.ports == {port.key: port for port in anew}
    assert model.digest == TenantModel(anew).digest
    assert compiler.emitted() == set(model.ports)
    assert compiler.clean


RECORDS = st.builds(
    Endpoint,
    address=st.sampled_from([b"\x0a\0\0\1", b"\x0a\0\0\2", b"\x0a\0\0\0", b"\xfe\0\0\0", b"\0\0\0\1"]),
    port=st.just(0),
    flags=st.integers(0, READY | SERVING | TERMINATING),
    node=st.sampled_from([0, name_id("n1"), name_id("n2")]),
    hints=st.sampled_from([None, HintSet((1,), ()), HintSet((1, 2), ()), HintSet((), (7,))]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.lists(RECORDS, max_size=6)), max_size=5))
def test_joining_packed_slices_equals_packing_all_their_endpoints(parts) -> None:
    held = []
    for port, records in parts:
        packed = pack_slice(endpoint_slice([], ports=[{"name": "", "port": port}]), None)
        octets, _, hint_sets = pack(records)
        held.append(msgspec.structs.replace(packed, endpoints=octets, hint_sets=hint_sets))
    expected = pack([record._replace(port=port) for port, records in parts for record in records])
    assert tuple(join("", Protocol.TCP, held, (4,))) == expected


# --- aliases ----------------------------------------------------------------------------------------------------------

VIPS = ["10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00::1:1", "127.0.0.1"]
UIDS = st.sampled_from(["u1", "u2"])


@st.composite
def named_services(draw):
    found = service(draw(NAMES), clusterIP=draw(st.sampled_from([*VIPS[:4], "None"])))
    return msgspec.structs.replace(found, metadata=msgspec.structs.replace(found.metadata, uid=draw(UIDS)))


ALIASES = st.builds(
    lambda uid, texts: Alias(uid, tuple(sorted(parse_address(text) for text in texts))),
    UIDS,
    st.lists(st.sampled_from(VIPS), unique=True, min_size=1, max_size=3),
)
ALIAS_EVENTS = st.one_of(
    named_services().map(lambda found: ("put", found)),
    NAMES.map(lambda name: ("delete", name)),
    st.tuples(NAMES, st.one_of(st.none(), ALIASES)).map(lambda said: ("alias", said)),
    st.just(("flush", None)),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(ALIAS_EVENTS, max_size=40))
def test_aliases_that_come_and_go_equal_compiling_with_the_last_ones(events) -> None:
    aliases, held, model = Aliases(), {}, TenantModel()
    compiler = started(aliases)
    for what, said in [*events, ("flush", None)]:
        if what == "put":
            compiler.put(said)
            held[said.key] = said
        elif what == "delete":
            compiler.delete("Service", ("default", said))
            held.pop(("default", said), None)
        elif what == "alias":
            aliases.put(("default", said[0]), said[1])
        else:
            change = compiler.flush()
            for key in change.removed:
                model.remove(key)
            for port in change.put:
                model.put(port)
    anew = Compiler(UNRESTRICTED, aliases=aliases)
    anew.listed("Service")
    anew.listed("EndpointSlice")
    for found in held.values():
        anew.put(found)
    assert model.ports == {port.key: port for port in anew.flush().put}
    own = {parse_address(found.spec.cluster_ip) for found in held.values() if found.spec.cluster_ip != "None"}
    dialled = [
        (frontend.address, frontend.port)
        for key, port in model.ports.items()
        for frontend in port.frontends
        if frontend.address not in own
        or frontend.address == parse_address(held[key.namespace, key.service].spec.cluster_ip)
    ]
    total = sum(len(port.frontends) for port in model.ports.values())
    assert len(dialled) == total, "nobody's own address is another's alias"


def test_of_two_that_claim_an_address_the_first_by_name_has_it() -> None:
    aliases, model = Aliases(), TenantModel()
    compiler = started(aliases)
    compiler.put(service("a", clusterIP="10.96.0.1"))
    compiler.put(service("b", clusterIP="10.96.0.2"))
    for name in ("b", "a"):
        aliases.put(("default", name), Alias("", (parse_address("10.32.0.1"),)))
    assert addresses(compiler, model) == {"a": ["10.32.0.1", "10.96.0.1"], "b": ["10.96.0.2"]}
    aliases.put(("default", "a"), None)
    assert addresses(compiler, model) == {"a": ["10.96.0.1"], "b": ["10.32.0.1", "10.96.0.2"]}


def addresses(compiler: Compiler, model: TenantModel) -> dict[str, list[str]]:
    change = compiler.flush()
    for key in change.removed:
        model.remove(key)
    for port in change.put:
        model.put(port)
    return {
        port.key.service: sorted(format_address(frontend.address) for frontend in port.frontends)
        for port in model.ports.values()
    }


def test_an_alias_is_one_more_cluster_ip_of_its_service_alone() -> None:
    aliases, model = Aliases(), TenantModel()
    compiler = started(aliases)
    for number in range(1, 100):
        compiler.put(service(f"s{number}", clusterIP=f"10.96.0.{number}"))
    compiler.put(endpoint_slice(["10.0.0.1"], service="s7"))
    addresses(compiler, model)
    aliases.put(("default", "s7"), Alias("", (parse_address("10.32.0.7"), parse_address("fd00::7"))))
    change = compiler.flush()
    assert names(change.put) == ["s7"], "the cost is one Service"
    (port,) = change.put
    assert [(frontend.kind, format_address(frontend.address), frontend.port) for frontend in port.frontends] == [
        (FrontendKind.CLUSTER_IP, "10.32.0.7", 80),
        (FrontendKind.CLUSTER_IP, "10.96.0.7", 80),
    ], "of the Service's own family"
    assert len(port.endpoints4) == 17


def test_an_alias_gives_way_to_a_service_that_has_the_address_itself() -> None:
    aliases, model = Aliases(), TenantModel()
    compiler = started(aliases)
    compiler.put(service("a", clusterIP="10.96.0.1"))
    aliases.put(("default", "a"), Alias("", (parse_address("10.96.0.2"),)))
    assert addresses(compiler, model) == {"a": ["10.96.0.1", "10.96.0.2"]}
    compiler.put(service("b", clusterIP="10.96.0.2"))
    assert addresses(compiler, model) == {"a": ["10.96.0.1"], "b": ["10.96.0.2"]}
    compiler.put(service("b", clusterIP="10.96.0.3"))
    assert addresses(compiler, model) == {"a": ["10.96.0.1", "10.96.0.2"], "b": ["10.96.0.3"]}
    compiler.put(service("b", clusterIP="10.96.0.2"))
    compiler.delete("Service", ("default", "b"))
    assert addresses(compiler, model) == {"a": ["10.96.0.1", "10.96.0.2"]}
    aliases.put(("default", "a"), Alias("", (parse_address("127.0.0.1"),)))
    assert addresses(compiler, model) == {"a": ["10.96.0.1"]}, "what is never allowed is no alias either"


# --- one by one -------------------------------------------------------------------------------------------------------


def started(aliases: Aliases | None = None, **policy) -> Compiler:
    compiler = Compiler(msgspec.structs.replace(UNRESTRICTED, **policy), aliases=aliases)
    if aliases is not None:
        aliases.changed = compiler.touch
    compiler.listed("Service")
    compiler.listed("EndpointSlice")
    return compiler


def names(ports) -> list[str]:
    return sorted(port.key.service for port in ports)


def test_nothing_before_both_have_been_listed() -> None:
    compiler = Compiler(UNRESTRICTED)
    compiler.put(service())
    compiler.listed("Service")
    assert compiler.flush() == ([], [])
    compiler.put(endpoint_slice(["10.0.0.1"]))
    assert compiler.flush() == ([], [])
    compiler.listed("EndpointSlice")
    assert len(compiler.flush().put[0].endpoints4) == 17


def test_slices_may_come_before_their_service() -> None:
    compiler = started()
    compiler.put(endpoint_slice(["10.0.0.1"]))
    assert compiler.flush() == ([], [])
    compiler.put(service())
    assert len(compiler.flush().put[0].endpoints4) == 17


def test_an_event_touches_one_service_only() -> None:
    compiler = started()
    for number in range(100):
        compiler.put(service(f"s{number}"))
        compiler.put(endpoint_slice(["10.0.0.1"], name=f"s{number}-1", service=f"s{number}"))
    assert len(compiler.flush().put) == 100
    compiler.put(endpoint_slice(["10.0.0.2"], name="s7-1", service="s7"))
    assert names(compiler.flush().put) == ["s7"]
    compiler.put(endpoint_slice(["10.0.0.2"], name="s7-1", service="s7"))
    assert compiler.flush() == ([], []), "an equal object is no change"


def test_a_slice_that_changes_its_service_leaves_the_old_one() -> None:
    compiler = started()
    compiler.put(service("a"))
    compiler.put(service("b"))
    compiler.put(endpoint_slice(["10.0.0.1"], service="a"))
    compiler.flush()
    compiler.put(endpoint_slice(["10.0.0.1"], service="b"))
    assert {port.key.service: len(port.endpoints4) for port in compiler.flush().put} == {"a": 0, "b": 17}


def test_a_service_turned_headless_and_a_port_that_went_are_removed() -> None:
    compiler = started()
    compiler.put(service(ports=[{"name": "a", "port": 1}, {"name": "b", "port": 2}]))
    compiler.flush()
    compiler.put(service(ports=[{"name": "b", "port": 2}]))
    change = compiler.flush()
    assert [key.port for key in change.removed] == ["a"]
    assert [port.key.port for port in change.put] == ["b"]
    compiler.put(service(clusterIP="None"))
    assert [key.port for key in compiler.flush().removed] == ["b"]


def test_the_last_good_form_stays_and_the_error_is_kept_until_mended() -> None:
    compiler = started()
    compiler.put(service())
    compiler.flush()
    compiler.put(service(clusterIP="nonsense"))
    assert compiler.flush() == ([], [])
    (said,) = compiler.explain("default", "web")
    assert (said.reason, said.field, said.value) == (Reason.MALFORMED, "spec.clusterIP", "nonsense")
    error = ShapeError(tenant="t", kind="Service", key=("default", "web"), field="$.spec.ports", reason="Expected int")
    compiler.malformed("Service", error)
    assert compiler.flush() == ([], [])
    assert compiler.explain("default", "web")[0].field == "$.spec.ports"
    compiler.put(service())
    assert compiler.flush() == ([], [])
    assert compiler.explain("default", "web") == ()
    assert list(compiler.refusals()) == []


def test_flush_gives_back_the_loop() -> None:
    compiler = started()
    for number in range(5):
        compiler.put(service(f"s{number}"))
    assert names(compiler.flush(lambda: True).put) == ["s0"]
    assert not compiler.clean
    assert names(compiler.flush().put) == ["s1", "s2", "s3", "s4"]
    assert compiler.clean


def test_over_a_limit_the_last_good_stays_and_room_is_noticed() -> None:
    noticed = []
    compiler = Compiler(
        msgspec.structs.replace(UNRESTRICTED, limits=Limits(services=1, endpoints=4, endpoints_per_service=3)),
        noticed=noticed.append,
    )
    compiler.listed("Service")
    compiler.listed("EndpointSlice")
    compiler.put(service("a"))
    compiler.put(service("b"))
    compiler.put(endpoint_slice(["10.0.0.1", "10.0.0.2"], name="a-1", service="a"))
    compiler.put(endpoint_slice(["10.0.0.3", "10.0.0.4"], name="a-2", service="a"))  # of one service
    compiler.put(endpoint_slice(["10.0.0.3", "10.0.0.4", "10.0.0.5"], name="b-1", service="b"))  # of all
    compiler.put(endpoint_slice([f"10.0.0.{n}" for n in range(1, 5)], name="a-1", service="a"))  # last good stays
    change = compiler.flush()
    assert names(change.put) == ["a"]
    assert len(change.put[0].endpoints4) == 2 * 17
    assert {said.reason for said in noticed} == {Reason.LIMIT}
    assert [said.name for said in compiler.refusals()] == ["b", "a-2", "b-1", "a-1"]
    assert compiler.degraded
    assert not compiler.starved
    compiler.delete("Service", ("default", "a"))
    assert compiler.starved
    compiler.put(service("b"))
    compiler.flush()
    assert compiler.emitted() == {port.key for port in compile_service(service("b"), [], UNRESTRICTED).ports}


def test_refusals_kept_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr("vcproxy.brain.compiler.MAX_RECORDED", 10)
    compiler = started()
    for number in range(50):
        compiler.put(service(f"s{number}", clusterIP="nonsense"))
    assert len(list(compiler.refusals())) == 10
