"""Control planes for the end-to-end tests.

Two kinds. The shared ones, a super cluster and two tenants, live for the whole session (a few seconds each to start,
so only when the first test asks): a test works in a namespace of its own there (`fresh_namespace`), and must not stop
or wipe them. The factory's live for one test, which may do to them what it likes.

Under pytest-xdist a session is a worker, so every worker that runs such a test starts planes of its own: correct, but
the shared ones cost seven CPU-seconds and 900 MB each time. On a machine with few cores run these tests in one process
(`pytest e2e`). xdist's own answer, `--dist loadgroup`, does nothing with the pinned pytest 9.2 and xdist 3.8: xdist
writes the group into an attribute that pytest no longer reads.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import pytest

from e2e.apiclient import ApiClient
from e2e.controlplane import (
    TENANT_SERVICE_CIDRS,
    ControlPlane,
    MissingBinaries,
    find_binaries,
    start_together,
)
from e2e.objects import namespace
from e2e.world import World, running

PlaneFactory = Callable[..., ControlPlane]
NamespaceFactory = Callable[..., str]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build missing programs if a test that needs them is going to run. Here and not in a fixture, because that takes
    longer than any test may. If it fails, the fixture says so for each of those tests and the others still run."""
    wanted = any(item.get_closest_marker("controlplane") for item in session.items)
    if not wanted or session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext(), suppress(MissingBinaries):
        find_binaries(build=True)


@pytest.fixture(scope="session")
def control_plane_binaries() -> Path:
    """The directory of etcd, kube-apiserver, kube-controller-manager and kube-proxy."""
    return find_binaries(build=False)


@pytest.fixture(scope="session")
def _shared_planes(
    control_plane_binaries: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ControlPlane, ControlPlane, ControlPlane]]:
    """Super cluster, tenant a, tenant b."""
    with ExitStack() as stack:
        planes = []
        for name, cidrs in (
            ("super", TENANT_SERVICE_CIDRS),
            ("tenant-a", TENANT_SERVICE_CIDRS),
            ("tenant-b", TENANT_SERVICE_CIDRS),
        ):
            directory = tmp_path_factory.mktemp(name)
            plane = ControlPlane(name, directory, service_cidrs=cidrs, bin_dir=control_plane_binaries)
            stack.callback(plane.close)
            planes.append(plane)
        start_together(planes)
        yield planes[0], planes[1], planes[2]


@pytest.fixture(scope="session")
def super_plane(_shared_planes: tuple[ControlPlane, ControlPlane, ControlPlane]) -> ControlPlane:
    """The super cluster's control plane: its Service ranges are the tenants', 10.32.0.0/16 and fd00:32::/108."""
    return _shared_planes[0]


@pytest.fixture(scope="session")
def tenant_planes(
    _shared_planes: tuple[ControlPlane, ControlPlane, ControlPlane],
) -> tuple[ControlPlane, ControlPlane]:
    """Two tenants' control planes with the same Service ranges, 10.32.0.0/16 and fd00:32::/108."""
    return _shared_planes[1:]


@pytest.fixture(scope="session")
def flat_world(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A world on the flat network, shared by tests that leave it as they found it: `acme` and `globex` with API
    servers, `initech` from manifests."""
    acme, globex = tenant_planes
    with running(
        tmp_path_factory.mktemp("flat"), super_plane, flat={"acme": acme, "globex": globex, "initech": None}
    ) as world:
        yield world


@pytest.fixture(scope="module")
def overlay_world(
    super_plane: ControlPlane,
    tenant_planes: tuple[ControlPlane, ControlPlane],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """As `flat_world`, with a network of its own for each tenant: their pods have the same addresses."""
    acme, globex = tenant_planes
    with running(
        tmp_path_factory.mktemp("overlay"), super_plane, overlay={"acme": acme, "globex": globex, "initech": None}
    ) as world:
        yield world


@pytest.fixture
def control_plane(control_plane_binaries: Path, tmp_path: Path) -> Iterator[PlaneFactory]:
    """A factory, control_plane(name, **ControlPlane's keywords): a started plane that this test may stop, kill,
    freeze and wipe."""
    with ExitStack() as stack:

        def start(
            name: str,
            *,
            service_cidrs: tuple[str, ...] = TENANT_SERVICE_CIDRS,
            address: str = "127.0.0.1",
            apiserver_flags: tuple[str, ...] = (),
        ) -> ControlPlane:
            plane = ControlPlane(
                name,
                tmp_path / name,
                service_cidrs=service_cidrs,
                address=address,
                apiserver_flags=apiserver_flags,
                bin_dir=control_plane_binaries,
            )
            stack.callback(plane.close)
            plane.start()
            return plane

        yield start


@pytest.fixture
def fresh_namespace() -> Iterator[NamespaceFactory]:
    """A factory, fresh_namespace(*clients): the name of a new namespace, the same in all these API servers; after the
    test its Services, Endpoints, EndpointSlices and Pods are deleted (and with them the ClusterIPs and NodePorts)."""
    with ExitStack() as stack:

        def create(*clients: ApiClient) -> str:
            name = f"test-{secrets.token_hex(4)}"
            for client in clients:
                client.create(namespace(name))
                for kind in ("Pod", "EndpointSlice", "Endpoints", "Service"):
                    stack.callback(client.delete_all, kind, name)
            return name

        yield create
