"""Connection tracking sized for a node that forwards Services: the sysctls that kube-proxy sets at start, by its rules.

The limit of entries only ever rises, and the hash table follows it at a quarter; both are the machine's, whatever
network namespace this is. Timeouts are the namespace's. A value that is right already is not written, so a read-only
/proc/sys is no trouble where somebody else has set them, `vcproxy run --init-only` for one. What cannot be written is
an error as in kube-proxy: a node that drops connections under load in a month is worse than one that says so now.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vcproxy.node.config import Conntrack
from vcproxy.ops import logs
from vcproxy.ops.configfile import ConfigError

MAX = "/proc/sys/net/netfilter/nf_conntrack_max"
HASHSIZE = "/sys/module/nf_conntrack/parameters/hashsize"
_NETFILTER = "/proc/sys/net/netfilter/nf_conntrack_"
_ONLINE = "/sys/devices/system/cpu/online"

MOST = 1 << 20
"""More entries than this are never asked for by the number of CPUs (kube-proxy 1.37)."""

log = logs.get("sysctls")

Read = Callable[[str], str]


class Setting(NamedTuple):
    """A file of /proc/sys or /sys, what it should hold, and the field that says so, which in kube-proxy is `flag`.

    `least`: more is fine.
    """

    path: str
    value: int
    field: str
    flag: str
    least: bool = False


def conntrack_max(config: Conntrack, cpus: int) -> int:
    """The limit of entries; 0: leave it alone. More CPUs than reach MOST win even over a `min` that is higher still,
    as in kube-proxy."""
    scaled = config.max_per_core * cpus
    if not scaled:
        return 0
    return MOST if scaled > MOST else max(scaled, config.min)


def wanted(config: Conntrack, cpus: int) -> Iterator[Setting]:
    """What the node should have, in the order of setting it."""
    if most := conntrack_max(config, cpus):
        yield Setting(MAX, most, "maxPerCore", "max-per-core", least=True)
        yield Setting(HASHSIZE, most // 4, "maxPerCore", "max-per-core", least=True)
    for name, value, field, flag in (
        ("tcp_timeout_established", config.tcp_established_seconds, "tcpEstablishedSeconds", "tcp-timeout-established"),
        ("tcp_timeout_close_wait", config.tcp_close_wait_seconds, "tcpCloseWaitSeconds", "tcp-timeout-close-wait"),
        ("tcp_be_liberal", int(config.tcp_be_liberal), "tcpBeLiberal", "tcp-be-liberal"),
        ("udp_timeout", config.udp_seconds, "udpSeconds", "udp-timeout"),
        ("udp_timeout_stream", config.udp_stream_seconds, "udpStreamSeconds", "udp-timeout-stream"),
    ):
        if value:
            yield Setting(_NETFILTER + name, value, field, flag)


def apply(
    config: Conntrack,
    *,
    read: Read = lambda path: Path(path).read_text(),
    write: Callable[[str, str], object] = lambda path, text: Path(path).write_text(text),
    cpus: int | None = None,
) -> None:
    """Make it so, for the network namespace of the calling thread. Raises ConfigError that names the field, the file
    and the cure."""
    for setting in wanted(config, cpus or count_cpus(read)):
        try:
            held = int(read(setting.path))
        except (OSError, ValueError):
            held = -1  # not there yet, or not to be read: writing will tell
        if held == setting.value or (setting.least and held > setting.value):
            continue
        try:
            write(setting.path, str(setting.value))
        except OSError as error:
            zero = "false" if setting.field == "tcpBeLiberal" else "0"
            raise ConfigError(
                f"conntrack.{setting.field} (of kube-proxy's flags --conntrack-{setting.flag}): "
                f"cannot set {setting.path} to {setting.value} (it is {held}): "
                f"{error.strerror or error}; run privileged or `vcproxy run --init-only` once as root, set it on the "
                f"node, or set this to {zero} to leave it alone"
            ) from error
        log.info("set", path=setting.path, value=setting.value, was=held)


def count_cpus(read: Read) -> int:
    """The node's online CPUs ("0-3,8"), of which this process may have fewer; those of the process if unreadable."""
    try:
        spans = [part.partition("-") for part in read(_ONLINE).strip().split(",")]
        return sum(int(last or first) - int(first) + 1 for first, _, last in spans)
    except (OSError, ValueError):
        return os.cpu_count() or 1
