"""Network namespaces of this machine: make, enter, list, remove.

A namespace belongs to a *thread*, not to a process (setns(2)), and a socket belongs to the namespace it was made in,
for ever. So one process can own sockets in as many namespaces as it likes: enter, make the socket, come back. That
costs three system calls, where `ip netns exec` costs a process; it is what lets a test hold connections of twenty pods
in plain variables.

`entered` moves the calling thread and brings it back. Do nothing slow inside it and never `await`: in a coroutine the
rest of the loop would run in the namespace too. Processes and threads started inside inherit the namespace; that is how
`spawn` works.

Names live in /run/netns, where iproute2 keeps them, so everything is visible to `ip netns`.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vcproxy.lab.errors import LabError
from vcproxy.lab.iproute import ip

DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12


def create(*names: str) -> None:
    """Make namespaces, empty but for a loopback device that is down. One process for all of them; stops at the first
    failure.
    """
    ip([f"netns add {name}" for name in names])


def delete(*names: str) -> None:
    """Remove namespaces, with the devices in them; the kernel destroys them behind our back, when the last socket in
    them is closed.

    One that is gone already is fine: two sweeps may meet.
    """
    present = [name for name in names if (DIRECTORY / name).exists()]
    try:
        ip([f"netns delete {name}" for name in present], keep_going=True)
    except LabError:
        if any((DIRECTORY / name).exists() for name in present):
            raise


def names() -> list[str]:
    """All named namespaces of this machine, sorted."""
    try:
        return sorted(entry.name for entry in DIRECTORY.iterdir())
    except FileNotFoundError:  # nobody ever made one
        return []


def pids(ns: str) -> list[int]:
    """The processes that live in the namespace (their main thread does), found by comparing namespace inodes like `ip
    netns pids`.
    """
    try:
        wanted = (DIRECTORY / ns).stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            theirs = (entry / "ns" / "net").stat()
        except OSError:  # ended meanwhile, or a kernel thread
            continue
        if (theirs.st_dev, theirs.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(int(entry.name))
    return found


@contextmanager
def entered(ns: str) -> Iterator[None]:
    """Run the body with the calling thread in the namespace. Keep the body short, and free of `await` (see above)."""
    # thread-self, not self: self is the main thread, and another thread may be elsewhere on purpose.
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            target = os.open(DIRECTORY / ns, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise LabError(f"network namespace {ns} does not exist: its lab is closed, or was swept") from None
        try:
            _setns(target)
            yield
        finally:
            _setns(home)
            os.close(target)
    finally:
        os.close(home)


def socket_in(ns: str, family: socket.AddressFamily, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
    """A new socket that lives in the namespace, whichever thread uses it later."""
    with entered(ns):
        return socket.socket(family, kind, protocol)


def sysctl(ns: str, settings: Mapping[str, int]) -> None:
    """Set kernel parameters of one namespace; keys are paths below /proc/sys/net ("ipv4/ip_forward").

    A key that begins with "-" may be missing, as in sysctl.conf(5).

    /proc/sys/net shows the namespace of the thread that looks (net_ctl_root in net/sysctl_net.c), so nothing needs
    mounting.
    """
    with entered(ns):
        for key, value in settings.items():
            try:
                Path("/proc/sys/net", key.removeprefix("-")).write_text(str(value))
            except OSError as error:
                if key.startswith("-") and isinstance(error, FileNotFoundError):
                    continue
                raise LabError(f"cannot set net/{key} to {value} in namespace {ns}: {error.strerror}") from error


def spawn(
    ns: str,
    argv: Sequence[str | os.PathLike[str]],
    *,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in the namespace. It sees this machine's files; only the network is another."""
    with entered(ns):
        return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd)


def run(
    ns: str, argv: Sequence[str | os.PathLike[str]], *, stdin: str = "", check: bool = True, timeout: float = 30.0
) -> subprocess.CompletedProcess[str]:
    """Run a command in the namespace to its end, with `stdin` as its input; text output is captured.

    Raises `LabError` with the command's own words when it fails (unless `check=False`) or takes more than `timeout`
    seconds.
    """
    process = spawn(ns, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        try:
            out, err = process.communicate(stdin.encode(), timeout=timeout)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise LabError(f"in namespace {ns}: {_shown(argv)} took more than {timeout:g} s") from None
            raise
    if check and process.returncode:
        raise LabError(f"in namespace {ns}: {_shown(argv)} ended with {process.returncode}: {err.decode().strip()}")
    return subprocess.CompletedProcess(argv, process.returncode, out.decode(), err.decode())


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _shown(argv: Sequence[str | os.PathLike[str]]) -> str:
    return " ".join(os.fspath(word) for word in argv)
