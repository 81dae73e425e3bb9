"""Lists as real API servers give them: in pages, and as the beginning of a watch where they have that.

What was asked and answered is read from the API server's audit log, where vcproxy is known by its name.
"""

import asyncio
import json
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import PlaneFactory
from e2e.controlplane import ControlPlane
from e2e.objects import endpoint_slice, service
from tests.unit.brain.polling import until
from tests.unit.kube.recording import Recorder
from vcproxy.brain.inputs import TENANT_KINDS
from vcproxy.kube.client import USER_AGENT, Client
from vcproxy.kube.decode import SERVICES, Resource
from vcproxy.kube.kubeconfig import load_kubeconfig
from vcproxy.kube.reflector import Deleted, Listed, Reflector, Upserted

pytestmark = pytest.mark.controlplane

OBJECTS = 30
PAGE = 7
STREAM = [("watch", True, 200)]
PAGES = {"services": 5, "endpointslices": 5, "servicecidrs": 1}
"""How many pages of so many objects each list has."""


@pytest.mark.parametrize(
    ("flag", "streams"),
    [("--watch-cache=true", True), ("--watch-cache=false", True), ("--feature-gates=WatchList=false", False)],
    ids=["from the cache", "from etcd", "switched off"],
)
async def test_a_list_is_a_stream_where_there_are_streams(
    control_plane: PlaneFactory, tmp_path: Path, flag: str, streams: bool
) -> None:
    policy = tmp_path / "audit.json"
    rules = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]}
    policy.write_text(json.dumps(rules))
    log = tmp_path / "audit.log"
    flags = (flag, f"--audit-policy-file={policy}", f"--audit-log-path={log}")
    plane = await asyncio.to_thread(lambda: control_plane("lists", apiserver_flags=flags))
    made = [service(f"web-{number}") for number in range(OBJECTS)]
    made += [endpoint_slice(f"web-{n}", service=f"web-{n}", endpoints=[f"10.244.0.{n}"]) for n in range(OBJECTS)]
    await asyncio.to_thread(plane.client.create_all, made)
    for resource in TENANT_KINDS:
        async with following(plane, resource) as recorder:
            await recorder.until(lambda recorder=recorder: bool(recorder.events))  # type: ignore[misc]
            [listed] = recorder.events
            assert isinstance(listed, Listed) and not listed.errors
            found = (await asyncio.to_thread(plane.client.list, resource.kind)).items
            keys = [(item["metadata"].get("namespace", ""), item["metadata"]["name"]) for item in found]
            assert sorted(found.key for found in listed.objects) == sorted(keys)
            name = resource.path.rpartition("/")[2]
            lists = [("list", False, 200)] * PAGES[name]
            expected = STREAM if streams else [("watch", True, 422), *lists, ("watch", False, 200)]
            await until(lambda resource=resource, expected=expected: requests(log, resource) == expected)
            if resource is SERVICES:
                await asyncio.to_thread(plane.client.create, service("later"))
                await asyncio.to_thread(plane.client.delete, "Service", "web-0", "default")
                await recorder.until(lambda recorder=recorder: bool(recorder.of(Deleted)))  # type: ignore[misc]
                [later] = recorder.of(Upserted)
                assert later.object.metadata.name == "later"
                assert [type(event) for event in recorder.events] == [Listed, Upserted, Deleted]
        assert requests(log, resource) == expected


@asynccontextmanager
async def following(plane: ControlPlane, resource: Resource[Any]) -> AsyncIterator[Recorder]:
    """A reflector meanwhile."""
    recorder = Recorder()
    credentials = load_kubeconfig(plane.kubeconfig.read_bytes())
    async with Client(credentials, tenant="t") as client, asyncio.TaskGroup() as group:
        task = group.create_task(Reflector(client, resource, recorder, page=PAGE, stream=True).run())
        yield recorder
        task.cancel()


def requests(log: Path, resource: Resource[Any]) -> list[tuple[str, bool, int]]:
    """What vcproxy asked for, in order: the verb, whether for a stream, and the status of the answer."""
    found: dict[str, tuple[str, bool, int]] = {}
    for line in log.read_text().split("\n")[:-1]:  # the last one may not be whole yet
        entry = json.loads(line)
        path, _, query = entry["requestURI"].partition("?")
        if entry.get("userAgent") == USER_AGENT and path == resource.path and "responseStatus" in entry:
            stream = urllib.parse.parse_qs(query).get("sendInitialEvents") == ["true"]
            found[entry["auditID"]] = entry["verb"], stream, entry["responseStatus"]["code"]
    return list(found.values())
