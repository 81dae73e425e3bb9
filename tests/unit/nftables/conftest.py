"""A network namespace for the tests of one module, with a table of every kind of map in it."""

import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.namespaces import own_namespace

TABLE = """
table inet vcproxy {
  map frontends { typeof ct zone . ip daddr . tcp dport : meta priority; }
  map frontends6 { typeof ct zone . ip6 daddr . tcp dport : meta priority; }
  map endpoints { typeof meta priority . numgen random mod 65536 : ip daddr . tcp dport; }
  map endpoints6 { typeof meta priority . numgen random mod 65536 : ip6 daddr . tcp dport; }
  map interfaces { typeof iifname : ct zone; }
  map addresses { typeof ip saddr : ct zone; }
  map nodeports { typeof tcp dport : meta priority; }
  map affinity { typeof meta priority . ip saddr : ip daddr . tcp dport; flags dynamic,timeout; timeout 3h; size 65535; }
  map balance { typeof meta priority : verdict; }
  set pools { typeof meta priority; }
  set hairpin { typeof ct zone . ip saddr . ip daddr; }
  set small { typeof ip daddr; size 4; }
  set ranges { typeof ct zone . ip daddr; flags interval; }
  set allowed { typeof ct zone . ip daddr . tcp dport . ip saddr; flags interval; }
  set sources { typeof ip saddr; flags interval; }
  chain one { }
  chain two { }
  chain lookup { meta priority vmap @balance; }
}
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    """This thread, and what it starts, is in a network namespace of its own for all tests of the module."""
    with own_namespace():
        yield


@pytest.fixture(scope="module")
def nft(namespace: None) -> Callable[[str], Any]:
    """Runs nft commands in the namespace; of one that begins with "list", what it prints as JSON, as objects."""

    def run(commands: str) -> Any:
        listing = commands.startswith("list ")
        words = ["-j", *commands.split()] if listing else ["-f", "-"]
        done = subprocess.run(["nft", *words], input=commands, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["nftables"] if listing else None

    return run


@pytest.fixture
def table(nft: Callable[[str], Any]) -> Callable[[str], Any]:
    """The table, new and empty; returns `nft`."""
    nft("flush ruleset\n" + TABLE)
    return nft
