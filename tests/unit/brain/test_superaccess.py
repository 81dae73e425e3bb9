"""The super cluster's kubeconfig is rewritten while the brain runs."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest
import trustme

from tests.fakes.apiserver import FakeApiServer
from tests.unit.brain.polling import until
from vcproxy.brain import superaccess
from vcproxy.brain.config import SuperCluster
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.ops.configfile import ConfigError


def mismatched(kubeconfig: bytes) -> bytes:
    """The same with a client certificate, and the key of another."""
    document = json.loads(kubeconfig)
    authority = trustme.CA()
    cert, other = authority.issue_cert("one"), authority.issue_cert("other")
    document["users"][0]["user"] = {
        "client-certificate-data": base64.b64encode(cert.cert_chain_pems[0].bytes()).decode(),
        "client-key-data": base64.b64encode(other.private_key_pem.bytes()).decode(),
    }
    return json.dumps(document).encode()


@pytest.mark.parametrize("read", [0, 1], ids=["nobody reads", "somebody reads"])
async def test_a_kubeconfig_that_cannot_be_used_is_a_problem_until_it_can(
    read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superaccess, "READ_AGAIN_SECONDS", 0.01)
    path = tmp_path / "super"
    async with FakeApiServer(token="first") as api:
        path.write_bytes(api.kubeconfig())
        access = SuperAccess(SuperCluster(kubeconfig=str(path)))
        inputs = [access.input([]) for _ in range(read)]
        first = access.client
        async with asyncio.TaskGroup() as group:
            task = group.create_task(access.run())
            path.write_bytes(mismatched(api.kubeconfig()))
            await until(lambda: "the last good credentials stay in use" in access.problem)
            assert access.client is first
            assert access.credentials.token == "first"
            path.write_bytes(api.kubeconfig().replace(b"first", b"second"))
            await until(lambda: not access.problem)
            assert access.client is not first
            assert access.client.credentials.token == access.credentials.token == "second"
            task.cancel()
        assert len(inputs) == read


async def test_at_the_start_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "super"
    async with FakeApiServer(token="first") as api:
        path.write_bytes(mismatched(api.kubeconfig()))
    with pytest.raises(ConfigError, match=r"superCluster: .*; or set superCluster: null if there is none"):
        SuperAccess(SuperCluster(kubeconfig=str(path)))
