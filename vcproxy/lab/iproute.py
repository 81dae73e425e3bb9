"""iproute2 in batches: a namespace is set up by one process that reads many commands, 3 ms where one process per
command takes 30.

Text was chosen over netlink on purpose: what the lab does to a node is what an operator would type, and a failed line
is shown as such.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from vcproxy.lab.errors import LabError, LabUnavailable

# What the kernel says when the machine, not the command, is at fault.
_MACHINE = {
    "Unknown device type": "the kernel has no such network device; load its module (veth, bridge, vxlan)",
    "Operation not permitted": "run as root with CAP_NET_ADMIN and CAP_SYS_ADMIN (in a container: --privileged)",
}


def ip(lines: Sequence[str], *, ns: str | None = None, family: int | None = None, keep_going: bool = False) -> None:
    """Run `ip` commands (without the word `ip`) in a namespace, in order.

    `family` (4 or 6) is needed by commands that cannot tell from their addresses, such as `rule add iif`.
    Stops at the first failure, or with `keep_going` does the rest first; either way raises `LabError` naming the line.
    """
    _batch("ip", lines, ns=ns, family=family, keep_going=keep_going)


def bridge(lines: Sequence[str], *, ns: str) -> None:
    """Run `bridge` commands (forwarding database) in a namespace, in order; errors as in `ip`."""
    _batch("bridge", lines, ns=ns, family=None, keep_going=False)


def _batch(tool: str, lines: Sequence[str], *, ns: str | None, family: int | None, keep_going: bool) -> None:
    if not lines:
        return
    argv = [tool]
    if family:
        argv.append(f"-{family}")
    if ns:
        argv += ["-n", ns]
    if keep_going:
        argv.append("-force")
    argv += ["-batch", "-"]
    done = subprocess.run(argv, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise failure(tool, lines, ns=ns, stderr=done.stderr)


def failure(tool: str, lines: Sequence[str], *, ns: str | None, stderr: str) -> LabError:
    """The error for a failed batch: the command that failed, found by the line number iproute2 gives, and the kernel's
    words.
    """
    where = re.search(r"Command failed -:(\d+)", stderr)
    line = lines[int(where[1]) - 1] if where else "; ".join(lines)
    words = " ".join(stderr[: where.start()].split() if where else stderr.split())
    message = f"`{tool} {line}`{f' in namespace {ns}' if ns else ''} failed: {words}"
    for symptom, cure in _MACHINE.items():
        if symptom in words:
            return LabUnavailable(f"{message}; {cure}")
    return LabError(message)
