"""Connection tracking at start: what kube-proxy 1.37 would set."""

import errno

import pytest

from vcproxy.node import sysctls
from vcproxy.node.config import Conntrack
from vcproxy.ops.configfile import ConfigError

NETFILTER = "/proc/sys/net/netfilter/nf_conntrack_"


class Machine:
    """Files by path; a write to one of `locked` is refused."""

    def __init__(self, files: dict[str, str], locked: tuple[str, ...] = ()) -> None:
        self.files, self.locked, self.written = files, locked, dict[str, str]()

    def read(self, path: str) -> str:
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return self.files[path]

    def write(self, path: str, text: str) -> None:
        if path in self.locked:
            raise OSError(errno.EROFS, "Read-only file system")
        self.files[path] = self.written[path] = text


@pytest.mark.parametrize(
    ("per_core", "least", "cpus", "most"),
    [
        (32768, 131072, 2, 131072),
        (32768, 131072, 8, 262144),
        (32768, 131072, 32, 1048576),
        (32768, 131072, 128, 1048576),
        (32768, 2097152, 2, 2097152),
        (32768, 2097152, 64, 1048576),
        (0, 131072, 8, 0),
        (1000, 0, 4, 4000),
    ],
)
def test_the_limit_of_entries(per_core: int, least: int, cpus: int, most: int) -> None:
    assert sysctls.conntrack_max(Conntrack(max_per_core=per_core, min=least), cpus) == most


DEFAULT = {
    sysctls.MAX: "65536\n",
    sysctls.HASHSIZE: "16384\n",
    f"{NETFILTER}tcp_timeout_established": "432000\n",
    f"{NETFILTER}tcp_timeout_close_wait": "60\n",
    f"{NETFILTER}tcp_be_liberal": "0\n",
    f"{NETFILTER}udp_timeout": "30\n",
    f"{NETFILTER}udp_timeout_stream": "120\n",
}
KUBE_PROXY = {
    sysctls.MAX: "131072",
    sysctls.HASHSIZE: "32768",
    f"{NETFILTER}tcp_timeout_established": "86400",
    f"{NETFILTER}tcp_timeout_close_wait": "3600",
}
NOTHING = Conntrack(max_per_core=0, tcp_established_seconds=0, tcp_close_wait_seconds=0)


@pytest.mark.parametrize(
    ("config", "files", "written"),
    [
        (Conntrack(), DEFAULT, KUBE_PROXY),
        (Conntrack(), DEFAULT | KUBE_PROXY, {}),
        (Conntrack(), DEFAULT | KUBE_PROXY | {sysctls.MAX: "262144", sysctls.HASHSIZE: "262144"}, {}),
        (Conntrack(), DEFAULT | KUBE_PROXY | {sysctls.HASHSIZE: "16384"}, {sysctls.HASHSIZE: "32768"}),
        (NOTHING, DEFAULT, {}),
        (
            Conntrack(max_per_core=0, tcp_established_seconds=0, tcp_close_wait_seconds=0, tcp_be_liberal=True, udp_seconds=60, udp_stream_seconds=240),
            DEFAULT,
            {f"{NETFILTER}tcp_be_liberal": "1", f"{NETFILTER}udp_timeout": "60", f"{NETFILTER}udp_timeout_stream": "240"},
        ),
    ],
    ids=["defaults", "all right already", "more is fine", "the hash table alone", "nothing asked for", "the others"],
)  # fmt: skip
def test_what_is_written(config: Conntrack, files: dict[str, str], written: dict[str, str]) -> None:
    machine = Machine(dict(files))
    sysctls.apply(config, read=machine.read, write=machine.write, cpus=2)
    assert machine.written == written


def test_a_read_only_file_is_an_error_only_where_it_would_have_to_change() -> None:
    right = Machine(DEFAULT | KUBE_PROXY, locked=tuple(DEFAULT))
    sysctls.apply(Conntrack(), read=right.read, write=right.write, cpus=2)
    wrong = Machine(dict(DEFAULT), locked=tuple(DEFAULT))
    with pytest.raises(ConfigError) as raised:
        sysctls.apply(Conntrack(), read=wrong.read, write=wrong.write, cpus=2)
    said = str(raised.value)
    assert said.startswith(
        f"conntrack.maxPerCore (of kube-proxy's flags --conntrack-max-per-core): cannot set {sysctls.MAX} to 131072 (it is 65536): Read-only"
    )
    assert "--init-only" in said


@pytest.mark.parametrize(("online", "count"), [("0-3\n", 4), ("0\n", 1), ("0-1,4-7,9\n", 7)])
def test_cpus_are_the_nodes(online: str, count: int) -> None:
    assert sysctls.count_cpus(lambda path: online) == count
