"""Tenants that projects host in the super cluster: who is found, how they are read, and what takes nothing away."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.apiserver import FakeApiServer, Fault, body, fail, html
from tests.unit.brain.hosted import (
    OTHER_UID,
    UID,
    Json,
    cluster,
    hosted_cluster,
    kubeconfig,
    root_of,
    secret,
    tenant_control_plane,
    vcluster_service,
    virtual_cluster,
)
from tests.unit.brain.kinds import pod
from tests.unit.brain.polling import settle, until
from vcproxy.brain.config import SuperCluster
from vcproxy.brain.sources import SourceComplete, SourceEvent, TenantFound, TenantGone
from vcproxy.brain.sources.attribution import CONTROL_PLANE, NAME, VCLUSTER, Owners, mark_of
from vcproxy.brain.sources.catalogue import PROJECTS
from vcproxy.brain.sources.hosted import HostedTenants
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.kube.kubeconfig import Credentials
from vcproxy.kube.reflector import Timing

TIMING = Timing(backoff_base=0.01, backoff_cap=0.05, resume_within=0.0)
ADMIN = "admin-kubeconfig"
CLUSTER_SECRET = "cluster.x-k8s.io/secret"
KAMAJI = {"kamaji.clastix.io/certificate_lifecycle_controller": "kubeconfig"}
VCLUSTER_LABELS = {"app": "vcluster", "vcluster-name": "blue"}
PATHS = {
    "virtualCluster": "/apis/tenancy.x-k8s.io/v1alpha1/virtualclusters",
    "clusterAPI": "/apis/cluster.x-k8s.io/v1beta2/clusters",
    "clusterAPI v1beta1": "/apis/cluster.x-k8s.io/v1beta1/clusters",
    "kamaji": "/apis/kamaji.clastix.io/v1alpha1/tenantcontrolplanes",
    "k0smotron": "/apis/k0smotron.io/v1beta2/clusters",
    "k0smotron v1beta1": "/apis/k0smotron.io/v1beta1/clusters",
    "hypershift": "/apis/hypershift.openshift.io/v1beta1/hostedclusters",
    "vcluster": "/api/v1/services",
}
VCS = PATHS["virtualCluster"]


class Running:
    """A source that runs, and what it has said."""

    def __init__(self, source: HostedTenants[Any], owners: Owners) -> None:
        self.source, self.owners = source, owners
        self.said: list[SourceEvent] = []

    @property
    def complete(self) -> bool:
        return SourceComplete() in self.said

    @property
    def found(self) -> dict[str, TenantFound]:
        """By uid, as last said; those gone are not among them."""
        held: dict[str, TenantFound] = {}
        for event in self.said:
            if isinstance(event, TenantFound):
                held[event.uid] = event
            elif isinstance(event, TenantGone):
                held.pop(event.uid)
        return held

    def access(self, uid: str = UID) -> Credentials | None:
        held = self.found.get(uid)
        assert held is None or held.access is None or isinstance(held.access, Credentials)
        return held.access if held else None

    def told(self, text: str) -> bool:
        return any(text in f"{problem.subject}: {problem.message}" for problem in self.source.problems())


@pytest.fixture
async def api() -> AsyncIterator[FakeApiServer]:
    async with FakeApiServer(token="super") as server:
        yield server


@contextlib.asynccontextmanager
async def running(
    api: FakeApiServer, directory: Path, title: str, namespaces: Sequence[str] = ()
) -> AsyncIterator[Running]:
    (directory / "super").write_bytes(api.kubeconfig())
    access, owners = SuperAccess(SuperCluster(kubeconfig=str(directory / "super"))), Owners()
    source = HostedTenants(PROJECTS[title], access, owners, namespaces=namespaces, timing=TIMING)
    found = Running(source, owners)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(source.run(found.said.append)), group.create_task(access.run())]
        try:
            yield found
        finally:
            for task in tasks:
                task.cancel()


def put(api: FakeApiServer, path: str, value: Json, kind: str = "") -> None:
    kinds = {"virtualclusters": "VirtualCluster", "tenantcontrolplanes": "TenantControlPlane"}
    kinds |= {"clusters": "Cluster", "hostedclusters": "HostedCluster", "services": "Service", "secrets": "Secret"}
    api.put(kinds[path.rpartition("/")[2]], value, path=path)


def put_secret(api: FakeApiServer, value: Json) -> None:
    api.put("Secret", value)


# --- what each project's objects say ----------------------------------------------------------------------------------

CASES = [
    # title, object, Secret's namespace, name, labels, type, key, server said, server dialled, certificate's name
    ("virtualCluster", virtual_cluster(), root_of(), ADMIN, {}, "Opaque", ADMIN,
     "https://10.96.184.119:6443", "https://10.96.184.119:6443", ""),
    ("virtualCluster", virtual_cluster(), root_of(), ADMIN, {}, "Opaque", ADMIN,
     f"https://[apiserver-svc.{root_of()}]:6443", f"https://apiserver-svc.{root_of()}:6443", ""),
    ("virtualCluster", virtual_cluster(root=""), root_of(), ADMIN, {}, "Opaque", ADMIN,
     "https://10.96.184.119:6443", "https://10.96.184.119:6443", ""),
    ("virtualCluster", virtual_cluster(phase="Error"), root_of(), ADMIN, {}, "Opaque", ADMIN,
     "https://10.96.184.119:6443", "https://10.96.184.119:6443", ""),
    # Cluster API's mode: the root namespace is its own, the annotation names the Secret.
    ("virtualCluster",
     virtual_cluster(root="default", annotations={"tenancy.x-k8s.io/secret.admin-kubeconfig": "capi-kubeconfig"}),
     "default", "capi-kubeconfig", {}, CLUSTER_SECRET, "value", "https://192.0.2.1:6443", "https://192.0.2.1:6443", ""),
    ("clusterAPI", cluster("cluster.x-k8s.io", "v1beta2"), "fleet", "blue-kubeconfig", {}, CLUSTER_SECRET, "value",
     "https://192.0.2.1:6443", "https://192.0.2.1:6443", ""),
    ("clusterAPI v1beta1", cluster("cluster.x-k8s.io", "v1beta1"), "fleet", "blue-kubeconfig", {}, CLUSTER_SECRET, "value",
     "https://192.0.2.1:6443", "https://192.0.2.1:6443", ""),
    ("k0smotron", cluster("k0smotron.io", "v1beta2"), "fleet", "blue-kubeconfig", {}, CLUSTER_SECRET, "value",
     "https://192.0.2.1:30443", "https://192.0.2.1:30443", ""),
    ("k0smotron v1beta1", cluster("k0smotron.io", "v1beta1"), "fleet", "blue-kubeconfig", {}, CLUSTER_SECRET, "value",
     "https://192.0.2.1:30443", "https://192.0.2.1:30443", ""),
    ("kamaji", tenant_control_plane(), "fleet", "blue-admin-kubeconfig", KAMAJI, "Opaque", "admin__svc",
     "https://blue.fleet.svc:6443", "https://blue.fleet.svc:6443", ""),
    ("kamaji", tenant_control_plane(secret_name=""), "fleet", "blue-admin-kubeconfig", KAMAJI, "Opaque", "super_admin__svc",
     "https://blue.fleet.svc:6443", "https://blue.fleet.svc:6443", ""),
    ("hypershift", hosted_cluster(), "fleet-blue-eu", "service-network-admin-kubeconfig", {}, "Opaque", "kubeconfig",
     "https://kube-apiserver:6443", "https://kube-apiserver.fleet-blue-eu.svc:6443", "kube-apiserver"),
    ("vcluster", vcluster_service(), "fleet", "vc-blue", VCLUSTER_LABELS, "Opaque", "config",
     "https://localhost:8443", "https://blue.fleet:443", ""),
    ("vcluster", vcluster_service(), "fleet", "vc-blue", VCLUSTER_LABELS, "Opaque", "config",
     "https://blue.example.com", "https://blue.example.com:443", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("title", "value", "namespace", "name", "labels", "kind", "key", "said", "server", "certificate"), CASES
)
@pytest.mark.parametrize("secret_first", [True, False])
async def test_what_a_projects_objects_say(
    api: FakeApiServer, tmp_path: Path, title: str, value: Json, namespace: str, name: str, labels: dict[str, str],
    kind: str, key: str, said: str, server: str, certificate: str, secret_first: bool,
) -> None:  # fmt: skip
    path, title = PATHS[title], title.partition(" ")[0]
    kept = secret(namespace, name, labels, kind, **{key.replace("-", "_"): kubeconfig(api.kubeconfig(), said)})
    kept["data"]["tls.key"] = "bm90IGZvciB1cw=="
    if secret_first:
        put_secret(api, kept)
    put(api, path, value)
    async with running(api, tmp_path, title) as found:
        await until(lambda: found.complete)
        if not secret_first:
            assert found.found[UID].access is None
            assert found.told("is not there (yet)")
            put_secret(api, kept)
        access = await until(found.access)
        assert (access.server, access.tls_server_name) == (server, certificate)
        assert found.found[UID].name == ".".join((value["metadata"]["namespace"], value["metadata"]["name"]))
        assert found.found[UID].restricted
        assert not found.source.problems()
        assert found.owners.owner((NAME, UID)) == UID
        assert found.owners.owner((NAME, found.found[UID].name)) == UID


async def test_a_kubeconfig_in_an_annotation_goes_before_any_secret(api: FakeApiServer, tmp_path: Path) -> None:
    inline = base64.encodebytes(kubeconfig(api.kubeconfig(), "https://192.0.2.9:6443")).decode()
    put(api, VCS, virtual_cluster(annotations={"tenancy.x-k8s.io/admin-kubeconfig": inline}))
    put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=kubeconfig(api.kubeconfig(), "https://192.0.2.1:6443")))
    async with running(api, tmp_path, "virtualCluster") as found:
        access = await until(found.access)
        assert access.server == "https://192.0.2.9:6443"


async def test_two_in_one_namespace_may_share_it_as_their_root(api: FakeApiServer, tmp_path: Path) -> None:
    for name, uid in (("a", UID), ("b", OTHER_UID)):
        note = {"tenancy.x-k8s.io/secret.admin-kubeconfig": f"{name}-kubeconfig"}
        put(api, VCS, virtual_cluster(name, uid=uid, root="default", annotations=note))
        config = kubeconfig(api.kubeconfig(), f"https://{name}.example.com:6443")
        put_secret(api, secret("default", f"{name}-kubeconfig", kind=CLUSTER_SECRET, value=config))
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(lambda: found.access(UID) and found.access(OTHER_UID))
        assert found.access(UID) != found.access(OTHER_UID)


async def test_what_a_vclusters_tenant_writes_is_no_vcluster(api: FakeApiServer, tmp_path: Path) -> None:
    put(api, PATHS["vcluster"], vcluster_service("forged-x-default-x-blue", **{"vcluster.loft.sh/managed-by": "blue"}))
    async with running(api, tmp_path, "vcluster") as found:
        await until(lambda: found.complete)
        assert found.found == {}


async def test_whose_a_vclusters_pods_are(api: FakeApiServer, tmp_path: Path) -> None:
    put(api, PATHS["vcluster"], vcluster_service())
    async with running(api, tmp_path, "vcluster") as found:
        await until(lambda: found.complete)
        tenants_own = {"vcluster.loft.sh/managed-by": "blue", "app": "vcluster", "release": "victim"}
        mark = mark_of(pod("x-x-default-x-blue", namespace="fleet", labels=tenants_own))
        assert mark is not None
        assert (mark[0], found.owners.owner(mark)) == (VCLUSTER, UID)
        mark = mark_of(pod("blue-0", namespace="fleet", labels={"app": "vcluster", "release": "blue"}))
        assert mark is not None
        assert (mark[0], found.owners.owner(mark)) == (CONTROL_PLANE, UID)
        mark = mark_of(pod("x", namespace="elsewhere", labels={"vcluster.loft.sh/managed-by": "blue"}))
        assert mark is not None
        assert found.owners.owner(mark) is None


async def test_only_the_namespaces_that_are_named(api: FakeApiServer, tmp_path: Path) -> None:
    put(api, PATHS["clusterAPI"], cluster("cluster.x-k8s.io", "v1beta2"))
    elsewhere = cluster("cluster.x-k8s.io", "v1beta2", uid=OTHER_UID)
    put(api, PATHS["clusterAPI"], {**elsewhere, "metadata": {**elsewhere["metadata"], "namespace": "else"}})
    put_secret(api, secret("fleet", "blue-kubeconfig", kind=CLUSTER_SECRET, value=api.kubeconfig()))
    async with running(api, tmp_path, "clusterAPI", ["fleet", "empty"]) as found:
        await until(lambda: found.complete and found.access())
        assert set(found.found) == {UID}
        read = {path for verb, path, _ in api.requests if verb in ("list", "watch")}
        assert read == {
            f"{prefix}/namespaces/{namespace}/{plural}"
            for namespace in ("fleet", "empty")
            for prefix, plural in (("/apis/cluster.x-k8s.io/v1beta2", "clusters"), ("/api/v1", "secrets"))
        }


# --- change, and what takes nothing away ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def one(api: FakeApiServer, directory: Path) -> AsyncIterator[Running]:
    """A VirtualCluster that has been found, with its credentials."""
    put(api, VCS, virtual_cluster())
    put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=api.kubeconfig()))
    async with running(api, directory, "virtualCluster") as found:
        await until(found.access)
        await api.watching("VirtualCluster")
        await api.watching("Secret")
        yield found


async def test_rotation_shows_in_the_secret_alone(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=kubeconfig(api.kubeconfig(), token="fresh")))
        await until(lambda: (access := found.access()) and access.token == "fresh")
        told = [event for event in found.said if isinstance(event, TenantFound)]
        assert len(told) == 2


@pytest.mark.parametrize("phase", ["Error", "Pending", "Updating", ""])
async def test_a_phase_takes_nothing_away(api: FakeApiServer, tmp_path: Path, phase: str) -> None:
    async with one(api, tmp_path) as found:
        before = list(found.said)
        put(api, VCS, virtual_cluster(phase=phase))
        put(api, VCS, virtual_cluster("late", uid=OTHER_UID))
        await until(lambda: OTHER_UID in found.found)
        assert found.said[: len(before)] == before
        assert found.access()


async def test_a_pending_one_exists_and_is_read_when_it_runs(api: FakeApiServer, tmp_path: Path) -> None:
    put(api, VCS, virtual_cluster(phase="Pending", root=""))
    put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=api.kubeconfig()))
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(lambda: found.complete)
        assert found.found[UID].access is None
        assert found.told("phase is Pending")
        put(api, VCS, virtual_cluster())
        await until(found.access)
        assert not found.source.problems()


BAD = {
    "not base64": "***",
    "not a kubeconfig": base64.b64encode(b"nonsense").decode(),
    "a program": base64.b64encode(
        b'{"clusters":[{"name":"c","cluster":{"server":"https://a"}}],"users":[{"name":"u","user":{"exec":{"command":"x"}}}],'
        b'"contexts":[{"name":"x","context":{"cluster":"c","user":"u"}}],"current-context":"x"}'
    ).decode(),
    "empty": "",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
async def test_bad_credentials_leave_the_last_good_ones(api: FakeApiServer, tmp_path: Path, text: str) -> None:
    async with one(api, tmp_path) as found:
        before = found.access()
        put_secret(api, {**secret(root_of(), ADMIN), "data": {ADMIN: text}})
        await until(lambda: found.told("the last good credentials stay in use"))
        assert found.access() == before
        put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=kubeconfig(api.kubeconfig(), token="mended")))
        await until(lambda: (access := found.access()) and access.token == "mended")
        assert not found.source.problems()


async def test_a_secret_that_goes_takes_nothing_away(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        api.delete("Secret", root_of(), ADMIN)
        await until(lambda: found.told("is not there (yet); the last good credentials stay in use"))
        assert found.access()


async def test_a_deleted_object_is_a_deleted_tenant(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        api.delete("VirtualCluster", "default", "tenant-a")
        await until(lambda: found.said[-1] == TenantGone(UID))
        assert found.owners.owner((NAME, UID)) != UID


async def test_the_same_name_with_another_uid_is_another_tenant(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        put(api, VCS, virtual_cluster(uid=OTHER_UID))
        await until(lambda: set(found.found) == {OTHER_UID})
        assert found.said[-2:] == [
            TenantGone(UID),
            TenantFound(OTHER_UID, "default.tenant-a", None, namespace="default", restricted=True),
        ]
        assert found.owners.owner((NAME, "default.tenant-a")) == OTHER_UID


async def test_a_name_that_another_project_uses_too_stays_with_it(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        found.owners.set((NAME, "default.tenant-a"), "another")
        api.delete("VirtualCluster", "default", "tenant-a")
        await until(lambda: found.said[-1] == TenantGone(UID))
        assert found.owners.owner((NAME, "default.tenant-a")) == "another"


async def test_an_object_without_a_name_hides_who_is_missing(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        before = list(found.said)
        listed = {"kind": "VirtualClusterList", "metadata": {"resourceVersion": "1000"}, "items": [{"metadata": {}}]}
        fault = Fault(body(json.dumps(listed).encode()), path=VCS, verb="list", times=1)
        api.faults.append(fault)
        api.put("Node", {"metadata": {"name": "n"}})
        api.compact()
        api.end_watches()
        await until(lambda: fault.times == 0 and not found.told("cannot be followed"))
        assert found.said == before


async def test_deleted_and_made_while_nobody_looked(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        port = api.port
        await api.stop()
        api.delete("VirtualCluster", "default", "tenant-a")
        put(api, VCS, virtual_cluster(uid=OTHER_UID))
        await api.start(port)
        await until(lambda: set(found.found) == {OTHER_UID})


async def test_a_super_api_server_that_is_away_takes_nothing_away(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        before = list(found.said)
        port = api.port
        await api.stop()
        await until(
            lambda: found.told("VirtualClusters cannot be followed") and found.told("Secrets cannot be followed")
        )
        await api.start(port)
        await until(lambda: not found.source.problems())
        await api.watching("VirtualCluster")
        assert found.said == before


ANSWERS = {"403": fail(403), "500": fail(500), "502 in HTML": html(502), "404": fail(404), "an HTML page": html(200)}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("what", [VCS, "/api/v1/secrets"])
async def test_a_failing_list_takes_nothing_away(api: FakeApiServer, tmp_path: Path, what: str, answer: Any) -> None:
    async with one(api, tmp_path) as found:
        before = list(found.said)
        fault = Fault(answer, path=what)
        api.faults.append(fault)
        api.end_watches()
        await until(found.source.problems)
        api.faults.remove(fault)
        await until(lambda: not found.source.problems())
        assert found.said == before


async def test_a_half_read_list_takes_nothing_away(api: FakeApiServer, tmp_path: Path) -> None:
    async with one(api, tmp_path) as found:
        for number in range(600):
            put(api, VCS, virtual_cluster(f"t{number:03}", uid=f"00000000-0000-4000-8000-000000000{number:03}"))
        await until(lambda: len(found.found) == 601)
        before = list(found.said)

        async def second_page_fails(request: Any) -> Any:
            return await fail(500)(request) if "continue" in request.query else api._list(request, VCS, "")

        fault = Fault(second_page_fails, path=VCS, verb="list")
        api.faults.append(fault)
        api.put("Node", {"metadata": {"name": "n"}})
        api.compact()
        api.end_watches()
        await until(lambda: found.told("VirtualClusters cannot be followed"))
        api.faults.remove(fault)
        await until(lambda: not found.told("cannot be followed"))
        assert found.said == before


async def test_nothing_is_said_before_all_is_known(api: FakeApiServer, tmp_path: Path) -> None:
    put(api, VCS, virtual_cluster())
    fault = Fault(fail(403), path="/api/v1/secrets")
    api.faults.append(fault)
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(lambda: found.told("grant list and watch"))
        await api.watching("VirtualCluster")
        await settle()
        assert found.said == []
        api.faults.remove(fault)
        await until(lambda: found.complete)
        assert isinstance(found.said[0], TenantFound)


async def test_an_object_that_cannot_be_read_holds_completeness_up(api: FakeApiServer, tmp_path: Path) -> None:
    put(api, VCS, {**virtual_cluster(), "status": {"phase": 7}})
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(lambda: found.told("default/tenant-a cannot be read"))
        assert not found.complete
        put(api, VCS, virtual_cluster())
        await until(lambda: found.complete)
        put(api, VCS, {**virtual_cluster(), "status": {"phase": 7}})
        put(api, VCS, virtual_cluster("late", uid=OTHER_UID))
        await until(lambda: set(found.found) == {UID, OTHER_UID})


async def test_a_definition_that_is_not_there_is_waited_for(api: FakeApiServer, tmp_path: Path) -> None:
    api.absent.add(VCS)
    put(api, VCS, virtual_cluster())
    put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=api.kubeconfig()))
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(lambda: found.told("no CustomResourceDefinition virtualclusters.tenancy.x-k8s.io"))
        assert found.said == []
        api.absent.clear()
        await until(found.access)
        assert found.complete
        # It goes (a broken upgrade), and comes back.
        before = list(found.said)
        api.absent.add(VCS)
        api.end_watches()
        await until(lambda: found.told("no CustomResourceDefinition"))
        api.absent.clear()
        await until(lambda: not found.source.problems())
        assert found.said == before


async def test_a_version_that_is_retired_gives_way_to_the_next(api: FakeApiServer, tmp_path: Path) -> None:
    old, new = PATHS["clusterAPI v1beta1"], PATHS["clusterAPI"]
    put(api, old, cluster("cluster.x-k8s.io", "v1beta1"))
    put_secret(api, secret("fleet", "blue-kubeconfig", kind=CLUSTER_SECRET, value=api.kubeconfig()))
    async with running(api, tmp_path, "clusterAPI") as found:
        await until(found.access)
        before = list(found.said)
        put(api, new, cluster("cluster.x-k8s.io", "v1beta2"))
        put(api, new, cluster("cluster.x-k8s.io", "v1beta2", "green", OTHER_UID))
        api.absent.add(old)
        api.end_watches()
        await until(lambda: OTHER_UID in found.found)
        assert found.said[: len(before)] == before
        assert UID in found.found


async def test_a_secret_of_its_own_name_is_followed_while_somebody_wants_it(api: FakeApiServer, tmp_path: Path) -> None:
    note = {"tenancy.x-k8s.io/secret.admin-kubeconfig": "mine"}
    put(api, VCS, virtual_cluster(annotations=note))
    put_secret(api, secret(root_of(), "mine", value=api.kubeconfig()))
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(found.access)
        await api.watching("VirtualCluster")
        put_secret(api, secret(root_of(), "mine", value=kubeconfig(api.kubeconfig(), token="fresh")))
        await until(lambda: (access := found.access()) and access.token == "fresh")
        put_secret(api, secret(root_of(), ADMIN, admin_kubeconfig=kubeconfig(api.kubeconfig(), token="usual")))
        put(api, VCS, virtual_cluster())
        await until(lambda: (access := found.access()) and access.token == "usual")
        asked = len([path for verb, path, _ in api.requests if path.endswith(f"/{root_of()}/secrets")])
        api.end_watches()
        await api.watching("Secret")
        await until(lambda: not found.source.problems())
        assert len([path for verb, path, _ in api.requests if path.endswith(f"/{root_of()}/secrets")]) == asked


@pytest.mark.parametrize("name", ["x,metadata.namespace=kube-system", "../tokens", "", "\x1b[2J"])
async def test_a_secrets_name_selects_nothing_else(api: FakeApiServer, tmp_path: Path, name: str) -> None:
    put(api, VCS, virtual_cluster(annotations={"tenancy.x-k8s.io/secret.admin-kubeconfig": name}))
    async with running(api, tmp_path, "virtualCluster") as found:
        await until(lambda: found.complete)
        assert found.told("is not there (yet)")
        assert not found.told("\x1b")
        assert {query.get("fieldSelector") for _, path, query in api.requests if "secrets" in path} == {
            f"metadata.name={ADMIN}"
        }
