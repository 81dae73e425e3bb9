"""The test bed itself: control planes behave as real ones do, also when they are killed, frozen, wiped or restarted.

What other end-to-end tests build on is proved here, so that their failures are vcproxy's.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from e2e.apiclient import ApiClient, ApiError
from e2e.conftest import NamespaceFactory, PlaneFactory
from e2e.controlplane import BUILD, ControlPlane
from e2e.objects import (
    endpoint,
    endpoint_slice,
    namespace,
    node,
    node_status,
    pod,
    pod_status,
    service,
    service_port,
)
from e2e.polling import eventually
from e2e.processes import Port, ProcessFailed

pytestmark = pytest.mark.controlplane


class TestSharedPlanes:
    def test_two_tenants_hold_the_same_cluster_ips_for_different_services(
        self, tenant_planes: tuple[ControlPlane, ControlPlane], fresh_namespace: NamespaceFactory
    ) -> None:
        a, b = (plane.client for plane in tenant_planes)
        name = fresh_namespace(a, b)
        ips = ["10.32.0.80", "fd00:32::80"]
        for client, service_name in ((a, "web"), (b, "database")):
            answer = client.create(service(service_name, namespace=name, cluster_ips=ips))
            assert answer.object["spec"]["clusterIPs"] == ips

    def test_cluster_ip_outside_the_planes_own_range_is_refused(
        self, super_plane: ControlPlane, fresh_namespace: NamespaceFactory
    ) -> None:
        name = fresh_namespace(super_plane.client)
        with pytest.raises(ApiError, match=r"422 Invalid.*does not match the current range"):
            super_plane.client.create(service("web", namespace=name, cluster_ips=["10.96.0.80"]))

    def test_dual_stack_service_gets_an_address_of_each_family(
        self, tenant_planes: tuple[ControlPlane, ControlPlane], fresh_namespace: NamespaceFactory
    ) -> None:
        client = tenant_planes[0].client
        name = fresh_namespace(client)
        spec = client.create(service("web", namespace=name, dual_stack=True)).object["spec"]
        assert spec["ipFamilies"] == ["IPv4", "IPv6"]
        assert spec["clusterIPs"][0].startswith("10.32.")
        assert spec["clusterIPs"][1].startswith("fd00:32::")

    def test_kubernetes_service_has_an_endpoint(self, super_plane: ControlPlane) -> None:
        client = super_plane.client
        [item] = client.list("EndpointSlice", "default", labels="kubernetes.io/service-name=kubernetes").items
        assert [e["addresses"] for e in item["endpoints"]] == [["192.0.2.1"]]
        assert client.get("Service", "kubernetes", "default").object["spec"]["clusterIP"] == "10.32.0.1"

    def test_credentials_of_one_tenant_are_worthless_at_another(
        self, tenant_planes: tuple[ControlPlane, ControlPlane], tmp_path: Path
    ) -> None:
        a, b = tenant_planes
        stolen = a.kubeconfig.read_text().replace(a.url, b.url)
        (tmp_path / "stolen").write_text(stolen)
        with pytest.raises(OSError, match="certificate verify failed"):
            ApiClient(tmp_path / "stolen").list("Service")

    def test_user_without_a_role_is_forbidden(self, super_plane: ControlPlane, tmp_path: Path) -> None:
        nobody = ApiClient(super_plane.write_kubeconfig(tmp_path / "nobody", user="nobody"))
        with pytest.raises(ApiError, match="403 Forbidden"):
            nobody.list("Service")


class TestClient:
    def test_objects_live_through_create_get_update_patch_list_delete(
        self, super_plane: ControlPlane, fresh_namespace: NamespaceFactory
    ) -> None:
        client = super_plane.client
        name = fresh_namespace(client)
        before = time.monotonic()
        created = client.create(service("web", namespace=name, ports=[service_port(80, target="http")]))
        assert before <= created.sent < created.answered <= time.monotonic()

        stale = client.get("Service", "web", name).object
        client.patch("Service", "web", {"spec": {"internalTrafficPolicy": "Local"}}, name)
        with pytest.raises(ApiError) as conflict:
            client.update(stale)
        assert conflict.value.reason == "Conflict"

        fresh = client.get("Service", "web", name).object
        fresh["metadata"]["labels"] = {"app": "web"}
        client.update(fresh)
        [listed] = client.list("Service", name, labels="app=web").items
        assert listed["spec"]["internalTrafficPolicy"] == "Local"
        assert listed["spec"]["ports"][0]["targetPort"] == "http"

        status = {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}
        client.patch("Service", "web", {"spec": {"type": "LoadBalancer"}}, name)
        assert client.patch_status("Service", "web", status, name).object["status"]["loadBalancer"]["ingress"]

        client.delete("Service", "web", name)
        with pytest.raises(ApiError) as gone:
            client.get("Service", "web", name)
        assert gone.value.reason == "NotFound"

    def test_many_slices_are_created_at_once_in_order(
        self, super_plane: ControlPlane, fresh_namespace: NamespaceFactory
    ) -> None:
        client = super_plane.client
        name = fresh_namespace(client)
        slices = [
            endpoint_slice(
                f"web-{i}",
                service="web",
                namespace=name,
                endpoints=[
                    endpoint(f"fd00:10::1:{i + 1:x}", node="n1", zone="z1", terminating=True, hint_zones=["z1"])
                ],
                ports=[8080],
            )
            for i in range(50)
        ]
        answers = client.create_all(slices)
        assert [answer.object["metadata"]["name"] for answer in answers] == [f"web-{i}" for i in range(50)]
        assert {answer.object["addressType"] for answer in answers} == {"IPv6"}
        assert len(client.list("EndpointSlice", name).items) == 50
        client.delete_all("EndpointSlice", name)
        assert client.list("EndpointSlice", name).items == []

    def test_plane_serves_on_another_address(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("elsewhere", address="127.0.0.2")
        assert plane.url.startswith("https://127.0.0.2:")
        assert plane.url in plane.kubeconfig.read_text()
        assert plane.client.list("Service").items

    def test_client_survives_a_restart_between_two_requests(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("restarted")
        plane.client.list("Service")
        plane.restart()
        assert plane.client.list("Service").items


class TestControllerManager:
    def test_pods_of_a_service_become_endpoint_slices_of_both_families(
        self, tenant_planes: tuple[ControlPlane, ControlPlane], fresh_namespace: NamespaceFactory
    ) -> None:
        plane = tenant_planes[0]
        plane.start_controller_manager()
        client = plane.client
        name = fresh_namespace(client)
        node_name = f"n-{name}"
        client.create(node(node_name, zone="z1", pod_cidrs=["10.244.1.0/24", "fd00:244:1::/64"]))
        client.patch_status("Node", node_name, node_status("192.0.2.11", "2001:db8::11"))
        client.create(
            service(
                "web",
                namespace=name,
                selector={"app": "web"},
                ports=[service_port(80, target="http")],
                dual_stack=True,
            )
        )
        container_ports = [{"name": "http", "containerPort": 8080}]
        client.create(pod("web-0", namespace=name, node=node_name, labels={"app": "web"}, ports=container_ports))

        def endpoints() -> dict[tuple[str, str], bool]:
            slices = client.list("EndpointSlice", name, labels="kubernetes.io/service-name=web").items
            assert all(item["ports"][0]["port"] == 8080 for item in slices if item["endpoints"])
            return {
                (e["addresses"][0], e["zone"]): e["conditions"]["ready"]
                for item in slices
                for e in item["endpoints"] or ()
            }

        def becomes(ready: bool) -> bool:
            return endpoints() == {("10.244.1.5", "z1"): ready, ("fd00:244:1::5", "z1"): ready}

        try:
            client.patch_status("Pod", "web-0", pod_status("10.244.1.5", "fd00:244:1::5"), name)
            eventually(lambda: becomes(ready=True), within=30, what="ready endpoints")
            client.patch_status("Pod", "web-0", pod_status("10.244.1.5", "fd00:244:1::5", ready=False), name)
            eventually(lambda: becomes(ready=False), what="unready endpoints")
        finally:
            client.delete("Node", node_name)

    def test_it_comes_back_with_the_plane(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("managed")
        plane.start_controller_manager()
        plane.kill()
        assert plane.pids == {}
        plane.start()
        assert set(plane.pids) == {"etcd", "kube-apiserver", "kube-controller-manager"}
        plane.client.create(namespace("doomed"))
        plane.client.delete("Namespace", "doomed")

        def gone() -> bool:
            return "doomed" not in {item["metadata"]["name"] for item in plane.client.list("Namespace").items}

        eventually(gone, within=30, what="end of namespace")


class TestPrograms:
    @pytest.mark.parametrize("program", ["kube-apiserver", "kube-controller-manager", "kube-proxy"])
    def test_version_is_the_one_that_go_mod_pins(self, control_plane_binaries: Path, program: str) -> None:
        done = subprocess.run(
            [control_plane_binaries / program, "--version"], capture_output=True, text=True, check=True
        )
        pin = re.search(r"k8s.io/kubernetes (v\S+)", (BUILD.parent / "go.mod").read_text())
        assert pin
        assert done.stdout == f"Kubernetes {pin[1]}\n"


class TestFaults:
    def test_killed_plane_keeps_data_and_address(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("killed")
        url, kubeconfig = plane.url, plane.kubeconfig.read_text()
        created = plane.client.create(service("web")).object
        plane.kill()
        with pytest.raises(ConnectionError):
            plane.client.list("Service")
        plane.start()
        assert (plane.url, plane.kubeconfig.read_text()) == (url, kubeconfig)
        kept = plane.client.get("Service", "web", "default").object
        assert kept["metadata"]["uid"] == created["metadata"]["uid"]
        assert kept["metadata"]["resourceVersion"] == created["metadata"]["resourceVersion"]

    def test_wiped_plane_is_empty_and_its_resource_versions_begin_again(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("wiped")
        plane.client.create_all(service(f"web-{i}") for i in range(50))
        before = plane.client.list("Service")
        plane.wipe_etcd()
        after = plane.client.list("Service")
        assert {item["metadata"]["name"] for item in after.items} <= {"kubernetes"}
        assert int(after.resource_version) < int(before.resource_version)

    def test_what_is_written_behind_its_back_is_served(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("behind")
        kept = plane.client.create(service("kept")).object
        with plane.behind_its_back():
            with pytest.raises(ConnectionError):
                plane.client.list("Service")
            plane.forge("services/specs", service("forged", cluster_ips=["10.32.0.77"]))
        assert plane.client.get("Service", "kept", "default").object == kept
        assert plane.client.get("Service", "forged", "default").object["spec"]["clusterIP"] == "10.32.0.77"

    def test_frozen_plane_hangs_requests_and_thawed_answers(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("frozen")
        impatient = ApiClient(plane.kubeconfig, timeout=0.5)
        impatient.list("Service")
        plane.freeze()
        with pytest.raises(TimeoutError):  # on the connection that was open
            impatient.list("Service")
        with pytest.raises(TimeoutError):  # on a new one
            impatient.list("Service")
        plane.thaw()
        assert plane.client.list("Service").items

    def test_frozen_plane_can_be_stopped(self, control_plane: PlaneFactory) -> None:
        plane = control_plane("frozen")
        plane.freeze()
        plane.stop()
        assert plane.pids == {}

    def test_plane_that_cannot_start_says_why_and_leaves_nothing(
        self, control_plane_binaries: Path, tmp_path: Path
    ) -> None:
        plane = ControlPlane("broken", tmp_path, service_cidrs=("not-a-range",), bin_dir=control_plane_binaries)
        with pytest.raises(ProcessFailed, match=r"broken/kube-apiserver ended with status(?s:.*)not a valid cidr"):
            plane.start()
        assert plane.pids == {}
        plane.close()


class TestProcesses:
    def test_killed_test_run_leaves_no_process(self, control_plane_binaries: Path, tmp_path: Path) -> None:
        program = textwrap.dedent("""
            import sys, threading
            from pathlib import Path
            from e2e.controlplane import BUILD, ControlPlane
            plane = ControlPlane("orphan", Path(sys.argv[1]), bin_dir=Path(sys.argv[2]))
            starter = threading.Thread(target=plane.start)  # a thread that ends must not take the plane with it
            starter.start()
            starter.join()
            plane.client.list("Service")
            print(*plane.pids.values(), flush=True)
            threading.Event().wait()
        """)
        command = [sys.executable, "-c", program, str(tmp_path), str(control_plane_binaries)]
        root = Path(__file__).parent.parent
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as run:
            try:
                assert run.stdout is not None
                pids = [int(pid) for pid in run.stdout.readline().split()]
                assert len(pids) == 2
            finally:
                run.send_signal(signal.SIGKILL)
        eventually(lambda: not any(_alive(pid) for pid in pids), what=f"end of {pids}")

    def test_ports_are_distinct_and_given_back(self) -> None:
        ports = [Port() for _ in range(200)]
        assert len({port.number for port in ports}) == 200
        for port in ports:
            port.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
