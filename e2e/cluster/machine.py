"""A machine: namespaces of every kind, with daemons in them.

What makes a program believe that it has a machine to itself is its own tree of mounts, network, process numbers, host
name, IPC and control groups; the kernel has a namespace for each. So kubelet and containerd run here as they would on a
node, and the host has no interface, rule, mount or file more than before. What namespaces cannot divide, files stand in
for (`SETTINGS`).

A machine lives as long as its maker keeps the control socket open (`init.py`). The one thing that the kernel does not
remove with the last process are control groups: they are named after the maker, and whoever makes the next machine
removes those of dead makers (`sweep`).
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from e2e.cluster.init import MESSAGE
from e2e.polling import eventually
from vcproxy.lab import netns
from vcproxy.lab.iproute import failure

PRIVATE = (
    "/etc/cni",
    "/var/lib/cni",
    "/var/lib/containerd",
    "/var/lib/kube-proxy",
    "/var/lib/kubelet",
    "/var/lib/vcproxy",
    "/var/log",
)
"""Folders that begin empty on every machine."""

SETTINGS = {
    "kernel/keys/root_maxbytes": 25_000_000,
    "kernel/keys/root_maxkeys": 1_000_000,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
}
"""The whole kernel's parameters that kubelet insists on (setupKernelTunables in kubernetes/pkg/kubelet/cm)."""

HOME = "/run"  # of everybody on a machine; the host's is the host's
PREFIX = "vcproxy-e2e"
_INIT = Path(__file__).with_name("init.py")
_GROUPS = Path("/sys/fs/cgroup")
_SERIALS = itertools.count()
_PATIENCE = 30.0  # seconds for an answer of the machine's first process; it needs about a millisecond


class MachineFailed(RuntimeError):
    """A machine or a daemon on it did not start, or ended; the message has the end of the log."""


class Machine:
    """One machine, started by the constructor; `close` ends everything on it.

    name: its host name. directory: for the daemons' logs. state: for the machine's own /var and the like; on a file
    system that overlayfs can write to; the caller removes it after `close`.
    """

    def __init__(self, name: str, *, directory: Path, state: Path) -> None:
        self.name = name
        self.directory = directory
        self._state = state
        directory.mkdir(parents=True, exist_ok=True)
        state.mkdir(parents=True, exist_ok=True)
        group = f"{PREFIX}.{os.getpid()}.{next(_SERIALS)}.{name}"
        self._groups = [parent / group for parent in _own_groups()]
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_PATIENCE)
        for path in self._groups:
            _make_group(path)
        with theirs, (directory / "machine.log").open("ab") as log:
            namespaces = ("--cgroup", "--mount", "--net", "--uts", "--ipc", "--pid")
            command = ["unshare", *namespaces, "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
            # The shell joins the control groups, so that everything in the machine is in them from its first moment.
            join = 'for group; do [ "$group" != -- ] || break; echo $$ > "$group/cgroup.procs"; shift; done; shift; exec "$@"'
            self._process = subprocess.Popen(
                [
                    "sh",
                    "-ec",
                    join,
                    "sh",
                    *map(str, self._groups),
                    "--",
                    *command,
                    sys.executable,
                    "-I",
                    "-S",
                    str(_INIT),
                ],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._ask(name=name, state=str(state), private=PRIVATE, settings=SETTINGS)
            self.pid = _only_child(self._process.pid)
            """Process id of the machine's first process, as the host sees it."""
        except BaseException:
            self.close()
            raise
        self.ns = f"/proc/{self.pid}/ns/net"
        """Its network namespace, for `vcproxy.lab.netns` and for dialling from it (`vcproxy.lab.dial.Place`)."""

    def start(self, name: str, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> None:
        """Start a daemon; output goes to DIRECTORY/NAME.log. Of the environment it gets PATH, HOME and what is given."""
        variables = {"PATH": os.defpath + ":/sbin:/usr/sbin", "HOME": HOME, **(environment or {})}
        self._ask(start=name, argv=list(argv), environment=variables, log=str(self.log(name)))

    def check(self, name: str) -> None:
        """Raise MachineFailed, with the end of the log, if a daemon that was started does not run any more."""
        if (status := self.status(name)) is not None:
            raise MachineFailed(f"{name} on {self.name} ended with status {status}; {self.tail(name)}")

    def status(self, name: str) -> int | None:
        """None while a daemon runs, else its exit status; negative: the signal that ended it."""
        status: int | None = self._ask(look=name)["status"]
        return status

    def stop(self, name: str, *, grace: float = 20.0) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds."""
        self._ask(signal=name, number=signal.SIGTERM)
        try:
            eventually(lambda: self.status(name) is not None, within=grace)
        except TimeoutError:
            self._ask(signal=name, number=signal.SIGKILL)
            eventually(lambda: self.status(name) is not None, within=grace)

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def tail(self, name: str, lines: int = 20) -> str:
        """The end of a daemon's log, with its place."""
        text = self.log(name).read_text(errors="replace") if self.log(name).exists() else ""
        return f"the end of {self.log(name)}:\n" + "\n".join(text.splitlines()[-lines:])

    def inside(self, *argv: str) -> list[str]:
        """The command that runs `argv` on the machine, as seen from the host."""
        return inside(self.pid, *argv)

    def run(
        self, *argv: str, stdin: str = "", check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine to its end. Raises MachineFailed with its words if it fails, unless check is off."""
        done = subprocess.run(
            self.inside(*argv), input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            words = (done.stderr or done.stdout).strip()
            raise MachineFailed(f"on {self.name}: {' '.join(argv)} ended with {done.returncode}: {words}")
        return done

    def ip(self, lines: Sequence[str]) -> None:
        """`ip` commands in its network namespace, in order. Raises LabError naming the first that fails."""
        done = netns.run(self.ns, ["ip", "-batch", "-"], stdin="\n".join(lines) + "\n", check=False)
        if done.returncode:
            raise failure("ip", lines, ns=self.name, stderr=done.stderr)

    def sysctl(self, settings: Mapping[str, int]) -> None:
        """Kernel parameters of its network namespace, as `netns.sysctl` has them."""
        netns.sysctl(self.ns, settings)

    def close(self) -> None:
        """End everything on the machine at once. Idempotent."""
        self._control.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        eventually(lambda: all(_remove_group(path) for path in self._groups), within=_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, **message: Any) -> dict[str, Any]:
        self._control.send(json.dumps(message).encode())
        answered = self._control.recv(MESSAGE)
        if not answered:
            raise MachineFailed(f"machine {self.name} ended; {self.tail('machine')}")
        answer: dict[str, Any] = json.loads(answered)
        if "error" in answer:
            raise MachineFailed(f"machine {self.name}: {answer['error']}")
        return answer


def inside(pid: int, *argv: str) -> list[str]:
    """The command that runs `argv` in all namespaces of a machine's first process."""
    return [
        "nsenter",
        f"--target={pid}",
        "--mount",
        "--net",
        "--uts",
        "--ipc",
        "--pid",
        "--cgroup",
        "--",
        "env",
        f"HOME={HOME}",
        *argv,
    ]


def sweep() -> None:
    """Remove the control groups of makers that are dead. Their processes are gone already, or are about to be."""
    for parent in _own_groups():
        for group in parent.glob(f"{PREFIX}.*"):
            match = re.fullmatch(rf"{re.escape(PREFIX)}\.(\d+)\.\d+\..+", group.name)
            if match and not Path("/proc", match[1]).exists():
                _remove_group(group)


def _own_groups() -> list[Path]:
    """This process's own control group in every hierarchy: machines' groups are below it."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers and not (_GROUPS / "unified").exists():
            raise MachineFailed("this machine has cgroup v2 only; e2e.cluster knows v1, alone or beside v2 (hybrid)")
        found.append(_GROUPS / (controllers.removeprefix("name=") or "unified") / path.lstrip("/"))
    return found


def _make_group(group: Path) -> None:
    group.mkdir()
    if (group / "cpuset.cpus").exists():  # empty at first, and then no process may join
        (group / "cgroup.clone_children").write_text("1")
        for file in ("cpuset.cpus", "cpuset.mems"):
            (group / file).write_text((group.parent / file).read_text())


def _remove_group(group: Path) -> bool:
    """Remove a control group and those below it; False while a process is still in one."""
    for folder, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):
            Path(folder).rmdir()
    return not group.exists()


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])
