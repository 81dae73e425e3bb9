"""What elements cost: encode and commit of many, and the transaction of a few, against the kernel's own floor.

    nice python -m benchmarks.netlink [--elements 100000 1000000] [--transactions 5000]

Runs as root, in a network namespace of its own. The floor is the same octets sent once more, made before the clock
starts: what no encoder can undercut. Dumps are read right behind a load, when the kernel may still be growing the hash
table, so that the first attempt may be torn and tried again.
"""

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vcproxy_nftables.batch import Batch
from vcproxy_nftables.elements import MapSpec
from vcproxy_nftables.netlink import Nfnetlink

CLONE_NEWNET = 0x40000000
CHUNK = 100_000  # operations of a transaction
TABLE = """
table inet vcproxy {
  map frontends { typeof ct zone . ip daddr . tcp dport : meta priority; }
  map endpoints { typeof meta priority . numgen random mod 65536 : ip daddr . tcp dport; }
}
"""
FRONTENDS = MapSpec("frontends", 12, 4)
ENDPOINTS = MapSpec("endpoints", 8, 8)

Matrix = npt.NDArray[np.uint8]


def timed(work: Callable[[], object]) -> float:
    """Seconds that it took."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def elements(count: int) -> tuple[Matrix, Matrix]:
    """Ten slots for each pool."""
    keys = np.zeros((count, 8), np.uint8)
    index = np.arange(count, dtype=np.uint32)
    keys[:, :4] = (index // 10).view(np.uint8).reshape(-1, 4)
    keys[:, 4:] = (index % 10).view(np.uint8).reshape(-1, 4)
    data = np.zeros((count, 8), np.uint8)
    data[:, :4] = (0x0A000000 + index).astype(">u4").view(np.uint8).reshape(-1, 4)
    data[:, 4:6] = np.full(count, 8080, ">u2").view(np.uint8).reshape(-1, 2)
    return keys, data


def encoded(netlink: Nfnetlink, keys: Matrix, data: Matrix | None) -> list[Batch]:
    """The transactions that add these, or remove them."""
    batches = []
    for at in range(0, len(keys), CHUNK):
        batch = netlink.batch()
        if data is None:
            batch.remove(ENDPOINTS, keys[at : at + CHUNK])
        else:
            batch.add(ENDPOINTS, keys[at : at + CHUNK], data[at : at + CHUNK])
        batches.append(batch)
    return batches


def load(netlink: Nfnetlink, count: int) -> None:
    """Print a row: encode, commit, the floor, dump and remove of so many elements."""
    keys, data = elements(count)

    def commit(batches: list[Batch]) -> None:
        for batch in batches:
            netlink.commit(batch)

    removals = encoded(netlink, keys, None)
    encode = timed(lambda: encoded(netlink, keys, data))
    additions = encoded(netlink, keys, data)
    whole = timed(lambda: commit(encoded(netlink, keys, data)))
    octets = [batch.message() for batch in additions]

    def send() -> None:
        for each in octets:
            with netlink.monitor().suspended(netlink.generation):  # as a commit of so many does
                answers, _ = netlink._commits.transact(each)
            assert [answer.error for answer in answers] == [0]

    commit(removals)
    floor = timed(send)
    dump = timed(lambda: netlink.dump(ENDPOINTS))
    remove = timed(lambda: commit(removals))
    print(f"{count:>10,} {encode:>9.3f} {whole:>15.3f} {floor:>9.3f} {dump:>9.3f} {remove:>9.3f}")


def small(netlink: Nfnetlink, transactions: int) -> None:
    """Print rows: build and commit of one endpoint's value and of a frontend's and an endpoint's."""
    keys, data = elements(CHUNK)
    batch = netlink.batch()
    batch.add(ENDPOINTS, keys, data)
    batch.add(FRONTENDS, bytes(12), bytes(4))
    netlink.commit(batch)

    def one(step: int) -> Batch:
        batch = netlink.batch()
        key = b"\xff\xff\xff\xff" + (step // 2).to_bytes(4, "little")
        if step % 2:
            batch.remove(ENDPOINTS, key)
        else:
            batch.add(ENDPOINTS, key, bytes(8))
        return batch

    def three(step: int) -> Batch:
        batch = netlink.batch()
        key = b"\xff\xff\xff\xfe" + (step // 2).to_bytes(4, "little")
        if step % 2:
            batch.remove(ENDPOINTS, key)
        else:
            batch.add(ENDPOINTS, key, bytes(8))
        batch.replace(FRONTENDS, bytes(12), step.to_bytes(4, "little"))
        return batch

    for name, make in (("1 element", one), ("3 elements", three)):
        builds, commits = [], []
        for step in range(transactions):
            begin = time.perf_counter_ns()
            batch = make(step)
            middle = time.perf_counter_ns()
            netlink.commit(batch)
            commits.append((time.perf_counter_ns() - middle) / 1000)
            builds.append((middle - begin) / 1000)
        floors = []
        for step in range(transactions):
            octets = make(step).message()
            floors.append(timed(lambda octets=octets: netlink._commits._socket.send(octets)) * 1e6)  # type: ignore[misc]
            netlink._commits._drain()
        whole = [build + commit for build, commit in zip(builds, commits, strict=True)]
        cells = (
            f"{statistics.median(each):>7.1f} {statistics.quantiles(each, n=100)[98]:>7.1f}"
            for each in (builds, whole, floors)
        )
        print(f"{name:>12} " + "   ".join(cells))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--transactions", type=int, default=5_000)
    options = parser.parse_args()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise SystemExit(f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}; run as root")
    subprocess.run(["nft", "-f", "-"], input=TABLE, text=True, check=True)
    netlink = Nfnetlink()
    netlink.monitor()
    gc.disable()
    print(f"Seconds, in transactions of {CHUNK:,}:")
    print("  elements    encode encode + commit     floor      dump    remove")
    for count in options.elements:
        load(netlink, count)
    print(f"\nMicroseconds (p50, p99) of {options.transactions:,} transactions, beside {CHUNK:,} elements:")
    print("                     build    build + commit     kernel alone")
    small(netlink, options.transactions)
    netlink.close()


if __name__ == "__main__":
    main()
