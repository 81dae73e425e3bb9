"""The images that run in the cluster, and the store that every node begins with; built once, from source and from Debian.

Their names are upstream's, because upstream's tests ask for them; their content is upstream's program (agnhost, pause)
over Debian instead of Alpine, with the tools that tests call by name. Nodes never pull: a name that is missing here is a
test that fails with ErrImagePull.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster import deployed, rootfs
from e2e.cluster.dockerfile import Builder
from e2e.cluster.machine import Machine
from e2e.cluster.node import PAUSE_IMAGE, import_image, start_containerd, with_image
from vcproxy.ops.pki import Authority

_CHECKOUT = Path(__file__).resolve().parents[2]
TESTS = "registry.k8s.io/e2e-test-images"
AGNHOST = f"{TESTS}/agnhost:2.66.1"
COREDNS = "registry.k8s.io/coredns/coredns:v1.15.0"

# What tests run in agnhost by name: in Alpine's image they come from busybox and from its own list of packages.
PACKAGES = (
    "bind9-dnsutils",
    "bind9-host",
    "busybox-static",
    "conntrack",
    "curl",
    "iperf",
    "iproute2",
    "iptables",
    "iputils-ping",
    "netcat-openbsd",
    "nftables",
    "procps",
    "wget",
)


@dataclass(frozen=True)
class Image:
    """tags: its names (kubernetes/test/utils/image/manifest.go); root: which root file system; config: OCI."""

    name: str
    tags: tuple[str, ...]
    root: str
    config: dict[str, Any]


IMAGES = (
    Image("pause", (PAUSE_IMAGE,), "pause", {"Entrypoint": ["/pause"], "User": "65535:65535"}),
    Image("coredns", (COREDNS,), "coredns", {"Entrypoint": ["/coredns"]}),
    Image(
        "agnhost",
        (
            AGNHOST,
            f"{TESTS}/agnhost:2.55",
            f"{TESTS}/glibc-dns-testing:2.1.1",
            "registry.k8s.io/build-image/distroless-iptables:v0.9.9",
        ),
        "agnhost",
        {"Entrypoint": ["/agnhost"], "Cmd": ["pause"], "WorkingDir": "/", "Env": [f"PATH={rootfs.PATH}"]},
    ),
    Image("busybox", (f"{TESTS}/busybox:1.37.0-2",), "busybox", {"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
    Image(
        "regression",
        (f"{TESTS}/regression-issue-74839:1.5",),
        "regression-issue-74839",
        {"Entrypoint": ["/regression-issue-74839"]},
    ),
)


def base(cache: Path) -> Path:
    """The minimal Debian under all images, made once."""
    root = cache / f"debian-{rootfs.SUITE}"
    if not root.exists():
        rootfs.bootstrap(root)
    return root


def store(programs: Path, cache: Path) -> Path:
    """The image store of containerd with all IMAGES, made once per content of `programs` (a folder named by its content)
    and of this file.
    """
    with _locked(cache / ".images.lock"):
        return _store(programs, cache)


def _store(programs: Path, cache: Path) -> Path:
    key = hashlib.sha256(Path(__file__).read_bytes() + Path(rootfs.__file__).read_bytes()).hexdigest()[:12]
    finished = programs / f"images-{key}"
    if finished.exists():
        return finished
    with tempfile.TemporaryDirectory(dir=programs, prefix="images.") as directory:
        work = Path(directory)
        _roots(work, programs, base(cache))
        with Machine("images", directory=work / "log", state=work / "state") as machine:
            start_containerd(machine)
            for image in IMAGES:
                path = work / f"{image.name}.tar"
                rootfs.archive(path, image.tags, [(work / image.root, ["."])], image.config)
                import_image(machine, path)
            machine.stop("containerd")
        (work / "state" / "var-lib-containerd").rename(finished)
    return finished


def with_vcproxy(store: Path, cache: Path) -> Path:
    """That store with the image that the checkout's Dockerfile describes; made once for each content of the two."""
    with _locked(cache / ".vcproxy.lock"):
        stage = Builder(_CHECKOUT, cache / "dockerfile", base(cache)).build(_CHECKOUT / "Dockerfile")
        finished = cache / f"vcproxy-{store.parent.name}-{store.name}-{stage.key}"
        if not finished.exists():
            for left in cache.glob("vcproxy-*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=cache, prefix="image.") as directory:
                work = Path(directory)
                rootfs.archive(work / "vcproxy.tar", (deployed.IMAGE,), [(stage.root, ["."])], stage.config)
                with_image(store, work / "vcproxy.tar", work / "state").rename(finished)
    return finished


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _roots(work: Path, programs: Path, debian: Path) -> None:
    """Lay out the root file system of every image below `work`."""
    for program in ("pause", "coredns", "regression-issue-74839"):
        (work / program).mkdir()
        shutil.copy2(programs / program, work / program / program)
    agnhost = work / "agnhost"
    rootfs.copy(debian, agnhost)
    install = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(PACKAGES)}"
    rootfs.run(agnhost, ["sh", "-ec", install], environment={"DEBIAN_FRONTEND": "noninteractive"})
    rootfs.slim(agnhost)
    # Some DNS tests run a CoreDNS of their own from this image, and one calls agnhost by its second name.
    for program in ("agnhost", "coredns"):
        shutil.copy2(programs / program, agnhost / program)
    (agnhost / "agnhost-2").symlink_to("agnhost")
    (agnhost / "uploads").mkdir()
    rootfs.registry(agnhost / "var/registry", "pause", "testing", work / "pause", {"Entrypoint": ["/pause"]})
    Authority("agnhost", days=3650).server(["localhost"]).write(
        agnhost, "localhost"
    )  # what `agnhost porter` serves with
    # Users that tests expect in the image (test/images/agnhost/Dockerfile).
    users = "useradd -u 1000 user-defined-in-image; groupadd -g 50000 group-defined-in-image"
    rootfs.run(agnhost, ["sh", "-ec", f"{users}; usermod -aG group-defined-in-image user-defined-in-image"])
    busybox = work / "busybox"
    for folder in ("bin", "dev", "etc", "proc", "root", "run", "tmp", "var"):
        (busybox / folder).mkdir(parents=True)
    shutil.copy2(agnhost / "usr/bin/busybox", busybox / "bin/busybox")
    rootfs.run(busybox, ["/bin/busybox", "--install", "-s", "/bin"])
    (busybox / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (busybox / "etc/group").write_text("root:x:0:\n")
