"""The first process of a machine (see `machine.py`), inside its namespaces. Run as a script; stdlib only.

It makes the inside of the namespaces look like a machine of its own, then starts daemons when its maker asks for them
over the control socket on descriptor 0, and reaps what ends. When the maker's end closes, however that came about, this
process ends, and the kernel ends everything else in the process namespace with it: no clean-up code has to run for
nothing to be left.

Control messages are single packets of JSON, each answered with one: {"start": NAME, "argv": [...], "environment": {...},
"log": FILE} with {"pid": as seen inside}; {"signal": NAME, "number": N} and {"look": NAME} with {"status": null while it
runs, else its exit status, negative for a signal}. What goes wrong is answered with {"error": WORDS}.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

MESSAGE = 65536  # octets, at most
# <linux/mount.h>
_BIND, _REC, _SHARED = 0x1000, 0x4000, 0x100000
_DETACH = 2  # MNT_DETACH of umount2(2)
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2). Raises OSError naming the target."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"mount of {kind or source} {options}: {os.strerror(number)}", target)


def furnish(name: str, state: Path, private: list[str], settings: dict[str, int]) -> None:
    """Make this a machine of its own.

    state: its directory outside, for what must not be the host's: `private` folders, which begin empty, and whatever is
    written to /etc, /usr and /var otherwise, which begin as the host's. settings: paths below /proc/sys that are the whole
    kernel's; programs may write their copies here, and read these values.
    """
    socket.sethostname(name)
    mount("sysfs", "/sys", "sysfs")
    _control_groups()
    # Named network namespaces of the host would stay alive here after their owner has deleted them.
    while _libc.umount2(b"/run/netns", _DETACH) == 0:
        pass
    mount("tmpfs", "/run", "tmpfs", options="mode=755")
    for folder in ("etc", "usr", "var"):
        upper, work = state / folder, state / f".{folder}"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        mount("overlay", f"/{folder}", "overlay", options=f"lowerdir=/{folder},upperdir={upper},workdir={work}")
    for folder in private:
        own = state / folder.strip("/").replace("/", "-")
        own.mkdir(exist_ok=True)
        Path(folder).mkdir(parents=True, exist_ok=True)
        mount(str(own), folder, flags=_BIND)
    for number, (setting, value) in enumerate(settings.items()):
        file = state / f"setting-{number}"
        file.write_text(f"{value}\n")
        mount(str(file), f"/proc/sys/{setting}", flags=_BIND)
    mount("none", "/", flags=_REC | _SHARED)  # containers' mounts reach kubelet, and the other way round


def _control_groups() -> None:
    """Mount the hierarchies that the host has; in this cgroup namespace each begins at the machine's own group."""
    mount("tmpfs", "/sys/fs/cgroup", "tmpfs", options="mode=755")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, _ = line.split(":", 2)
        folder = Path("/sys/fs/cgroup", controllers.removeprefix("name=") or "unified")
        folder.mkdir()
        mount("cgroup", str(folder), "cgroup" if controllers else "cgroup2", options=controllers)


class Daemons:
    """What this process has started, by name."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}
        self._ended: dict[int, int] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        match message:
            case {"start": name, "argv": argv, "environment": environment, "log": log}:
                files = [
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ]
                # Python ignores SIGPIPE, which its children would inherit.
                self._pids[name] = os.posix_spawnp(
                    argv[0], argv, environment, file_actions=files, setsid=True, setsigdef=[signal.SIGPIPE]
                )
                return {"pid": self._pids[name]}
            case {"signal": name, "number": number}:
                self.reap()
                if self._pids[name] not in self._ended:
                    os.kill(self._pids[name], number)
                return {}
            case {"look": name}:
                self.reap()
                return {"status": self._ended.get(self._pids[name])}
        raise ValueError(f"unknown message {message}")

    def reap(self) -> None:
        """Collect every process that has ended: daemons, and orphans that came to the first process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self._pids.values():
                self._ended[pid] = os.waitstatus_to_exitcode(status)


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    os.set_inheritable(control.fileno(), False)
    orders = json.loads(control.recv(MESSAGE))
    furnish(orders["name"], Path(orders["state"]), orders["private"], orders["settings"])
    control.send(b"{}")
    wake, ended = socket.socketpair()
    for end in (wake, ended):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    daemons = Daemons()
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(ended, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is ended:
                ended.recv(MESSAGE)
                daemons.reap()
                continue
            message = control.recv(MESSAGE)
            if not message:
                sys.exit()
            try:
                answer = daemons.answer(json.loads(message))
            except (OSError, KeyError, ValueError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            control.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
