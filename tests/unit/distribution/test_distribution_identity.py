"""Who may have what: certificates name nodes, and a node gets its own tenants and no others."""

import asyncio
import contextlib
import datetime
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.unit.distribution.rig import ACME, BETA, Certificates, Placed, Wire, brain, node, service_port, until, wire
from vcproxy.brain.certificates import CertificateError, ServerCertificates
from vcproxy.brain.distribution import Limits
from vcproxy.brain.identity import NotANode, node_of_certificate
from vcproxy.model.tenant import TenantModel
from vcproxy.node.holdings import Connected, Disconnected
from vcproxy.ops.pki import Authority
from vcproxy.pb import distribution_pb2

A = "node-a"


def certificate(names: Sequence[str], organizations: Sequence[str]) -> bytes:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
        + [x509.NameAttribute(NameOID.ORGANIZATION_NAME, name) for name in organizations]
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(private, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_kubelets_certificate_names_its_node() -> None:
    assert node_of_certificate(certificate(["system:node:n-1.example"], ["system:nodes"])) == "n-1.example"
    assert node_of_certificate(certificate(["system:node:n-1"], ["other", "system:nodes"])) == "n-1"


@pytest.mark.parametrize(
    ("names", "organizations"),
    [
        (["n-1"], ["system:nodes"]),
        (["system:node:n-1"], []),
        (["system:node:n-1"], ["system:masters"]),
        (["system:node:"], ["system:nodes"]),
        (["system:node:N_1"], ["system:nodes"]),
        (["system:node:../n-1"], ["system:nodes"]),
        (["system:node:n-1\n"], ["system:nodes"]),
        (["system:node:n-1", "system:node:n-2"], ["system:nodes"]),
        ([], ["system:nodes"]),
    ],
)
def test_any_other_certificate_names_none(names: list[str], organizations: list[str]) -> None:
    with pytest.raises(NotANode):
        node_of_certificate(certificate(names, organizations))


async def test_a_node_cannot_watch_as_another(certificates: Certificates) -> None:
    async with (
        brain(certificates, Placed({"node-b": ["acme-1"]})) as b,
        wire(certificates.node(A), b.address, certificates.ca) as w,
    ):
        b.tenant(ACME)
        await w.hello("node-b")
        code, details = await w.refusal()
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "node-a" in details


async def test_a_client_without_a_certificate_is_not_let_in(certificates: Certificates) -> None:
    async with brain(certificates, Placed({})) as b, wire(None, b.address, certificates.ca) as w:
        assert (await said(w))[0] is grpc.StatusCode.UNAVAILABLE
        assert b.distributor.nodes() == []


async def test_a_client_of_another_authority_is_not_let_in(certificates: Certificates) -> None:
    tls = certificates.node(A, Authority("somebody else's").node(A))
    async with brain(certificates, Placed({})) as b, wire(tls, b.address, certificates.ca) as w:
        assert (await said(w))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_persons_certificate_of_the_same_authority_is_refused(certificates: Certificates) -> None:
    person = certificates.authority.client(A, ("system:masters",))
    tls = certificates.node(A, person)
    async with brain(certificates, Placed({})) as b, wire(tls, b.address, certificates.ca) as w:
        code, details = await said(w)
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "system:node:NAME" in details


async def said(w: Wire) -> tuple[grpc.StatusCode, str]:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await w.hello(A)
    return await w.refusal()


async def test_a_session_does_not_trust_a_brain_of_another_name(certificates: Certificates) -> None:
    tls = certificates.node(A, server_name="elsewhere.example")
    async with brain(certificates, Placed({})) as b, node(A, tls, b.address) as n:
        await until(lambda: n.saw(Disconnected))
        assert not n.saw(Connected)


async def test_a_tenant_that_is_not_placed_on_the_node_is_not_sent_even_when_asked_for(
    certificates: Certificates,
) -> None:
    async with brain(certificates, Placed({A: ["acme-1"]})) as b:
        b.tenant(ACME, service_port("web", 1))
        b.tenant(BETA, service_port("secret", 1))
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A)
            await w.kinds("synced")
            await w.say(subscribe=distribution_pb2.Subscribe(tenant="beta-1", refresh=True))
            b.store.update("beta-1", [service_port("secret", 1, 2)], [])
            await w.say(subscribe=distribution_pb2.Subscribe(tenant="acme-1", refresh=True))
            while True:
                message = await w.next()
                assert message is not None
                assert b"beta" not in message.SerializeToString()
                if message.WhichOneof("message") == "synced":
                    break


async def test_a_claim_to_hold_a_tenant_of_others_is_answered_by_its_removal(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: []})) as b:
        b.tenant(BETA, service_port("secret", 1))
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A, {"beta-1": bytes(32)})
            assert await w.kinds("removed") == ["welcome", "facts", "placement", "complete", "removed"]


async def test_unsubscribed_tenant_is_left_alone_until_subscribed_again(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1", "beta-1"]})) as b:
        b.tenant(ACME)
        b.tenant(BETA)
        async with wire(certificates.node(A), b.address, certificates.ca) as w:
            await w.hello(A)
            await w.kinds("synced", 2)
            await w.say(unsubscribe=distribution_pb2.Unsubscribe(tenant="acme-1"))
            # Messages of a stream are in order: once this is answered, the one before it was acted on.
            await w.say(subscribe=distribution_pb2.Subscribe(tenant="beta-1", refresh=True))
            await w.kinds("synced")
            b.store.update("acme-1", [service_port("web", 1)], [])
            b.store.update("beta-1", [service_port("web", 1)], [])
            message = await w.next()
            assert message is not None
            assert message.delta.tenant == "beta-1"
            await w.say(subscribe=distribution_pb2.Subscribe(tenant="acme-1"))
            message = await w.next()
            assert message is not None
            assert message.delta.tenant == "acme-1"


BAD_FIRST = {
    "no Hello": distribution_pb2.NodeMessage(ack=distribution_pb2.Ack(tenant="acme-1")).SerializeToString(),
    "nothing": b"",
    "no protobuf": b"\xff\xff\xff",
    "an uid that cannot be": distribution_pb2.NodeMessage(
        hello={"node": A, "known": [{"tenant": "../etc", "digest": bytes(32)}]}
    ).SerializeToString(),
    "a short digest": distribution_pb2.NodeMessage(
        hello={"node": A, "known": [{"tenant": "acme-1", "digest": b"1"}]}
    ).SerializeToString(),
    "a tenant twice": distribution_pb2.NodeMessage(
        hello={"node": A, "known": [{"tenant": "acme-1", "digest": bytes(32)}] * 2}
    ).SerializeToString(),
}


@pytest.mark.parametrize("what", BAD_FIRST)
async def test_a_bad_first_message_ends_the_stream_with_a_reason(certificates: Certificates, what: str) -> None:
    async with (
        brain(certificates, Placed({A: []})) as b,
        wire(certificates.node(A), b.address, certificates.ca) as w,
    ):
        await w.write(BAD_FIRST[what])
        code, details = await w.refusal()
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details


async def test_bad_input_ends_that_stream_and_no_other(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"], "node-b": ["acme-1"]})) as b:
        b.tenant(ACME)
        async with (
            node("node-b", certificates.node("node-b"), b.address) as other,
            wire(certificates.node(A), b.address, certificates.ca) as w,
        ):
            await w.hello(A)
            await w.kinds("synced")
            await w.say(ack=distribution_pb2.Ack(tenant="acme-1", stage=distribution_pb2.COMMITTED, digest=b"short"))
            assert (await w.refusal())[0] is grpc.StatusCode.INVALID_ARGUMENT
            await until(lambda: [status.node for status in b.distributor.nodes()] == ["node-b"])
            b.store.update("acme-1", [service_port("web", 1)], [])
            await until(lambda: other.has(TenantModel([service_port("web", 1)]).digest))
            assert len(other.saw(Connected)) == 1


async def test_a_message_too_large_is_refused(certificates: Certificates) -> None:
    async with (
        brain(certificates, Placed({A: []}), limits=Limits(message_octets=1000)) as b,
        wire(certificates.node(A), b.address, certificates.ca) as w,
    ):
        await w.write(bytes(2000))
        assert (await w.refusal())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_never_says_hello_is_not_kept(certificates: Certificates) -> None:
    async with (
        brain(certificates, Placed({A: []}), limits=Limits(hello_timeout=0.1)) as b,
        wire(certificates.node(A), b.address, certificates.ca) as w,
    ):
        assert (await w.refusal())[0] is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_of_too_many_streams_of_one_node_the_oldest_ends(certificates: Certificates) -> None:
    tls = certificates.node(A)
    async with (
        brain(certificates, Placed({A: []}), limits=Limits(streams_per_node=2)) as b,
        contextlib.AsyncExitStack() as stack,
    ):
        wires = []
        for _ in range(3):
            w = await stack.enter_async_context(wire(tls, b.address, certificates.ca))
            await w.hello(A)
            await w.kinds("complete")
            wires.append(w)
        assert (await wires[0].refusal())[0] is grpc.StatusCode.ABORTED
        await until(lambda: len(b.distributor.nodes()) == 2)


def rewrite(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(path)


async def test_certificates_rotate_without_dropping_streams(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: ["acme-1"], "node-b": ["acme-1"]})) as b:
        b.tenant(ACME)
        async with node(A, certificates.node(A), b.address) as old:
            await until(lambda: old.saw(Connected))
            fresh = Authority("the next")
            pair = fresh.server(["127.0.0.1"])
            rewrite(certificates.server, pair.certificate)
            rewrite(certificates.server_key, pair.key)
            rewrite(certificates.ca, fresh.certificate)
            tls = certificates.node("node-b", fresh.node("node-b"))
            async with node("node-b", tls, b.address) as new:
                await until(lambda: new.saw(Connected))
                b.store.update("acme-1", [service_port("web", 1)], [])
                digest = b.store.tenants()["acme-1"].model.digest
                await until(lambda: old.has(digest) and new.has(digest))
                assert not old.saw(Disconnected)
                stale = certificates.node("node-b", certificates.authority.node("node-b"))
                async with node("node-b", stale, b.address) as refused:
                    await until(lambda: refused.saw(Disconnected))
                    assert not refused.saw(Connected)


async def test_a_half_written_rotation_leaves_the_last_good_certificate(certificates: Certificates) -> None:
    async with brain(certificates, Placed({A: []})) as b:
        pair = certificates.authority.server(["127.0.0.1"])
        rewrite(certificates.server, pair.certificate)
        async with node(A, certificates.node(A), b.address) as n:
            await until(lambda: n.saw(Connected))
        rewrite(certificates.server_key, b"no key")
        async with node(A, certificates.node(A), b.address) as n:
            await until(lambda: n.saw(Connected))


def test_a_key_of_another_certificate_is_named_at_the_start(certificates: Certificates) -> None:
    rewrite(certificates.server_key, certificates.authority.server(["127.0.0.1"]).key)
    files = {"certificate": certificates.server, "key": certificates.server_key, "client_ca": certificates.ca}
    with pytest.raises(CertificateError, match=r"brain\.key"):
        ServerCertificates(**files).credentials()
    certificates.server.unlink()
    with pytest.raises(CertificateError, match=r"brain\.crt"):
        ServerCertificates(**files).credentials()
