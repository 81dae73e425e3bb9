"""The cluster for people.

    python -m e2e.cluster build
    python -m e2e.cluster up [--proxy vcproxy|kube-proxy|run|split|none] [--nodes 3]
    python -m e2e.cluster enter control kubectl get pods -A     # or n1, n2, ...; without a command: a shell
    python -m e2e.cluster status
    python -m e2e.cluster down
    python -m e2e.cluster test [--proxy NAME] [--nodes 6] [--write] [FOCUS ...]   # upstream's tests, in clusters of its own

`up` leaves a keeper behind, the process whose machines these are; `down` ends it, and they end with it. The keeper holds a
lock for as long as it lives, so a file that a crash has left is never taken for a cluster.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from e2e.cluster import comparison, images, proxies, upstream
from e2e.cluster.cluster import CACHE, Cluster, assets
from e2e.cluster.machine import inside
from e2e.polling import eventually

HOME = CACHE / "up"
_LOCK, _FACTS, _LOG = HOME / "lock", HOME / "facts.json", HOME / "keeper.log"
_UP_WITHIN = 3600.0  # seconds; the first time everything is built


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description="A Kubernetes cluster on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # `up` starts a process that does the latter, which is nobody else's business.
    for command in (commands.add_parser("up", help="start it"), commands.add_parser("keep")):
        command.add_argument("--proxy", choices=proxies.PROXIES, default="vcproxy")
        command.add_argument("--nodes", type=int, default=3, choices=range(1, 10), metavar="1..9")
    commands.add_parser("build", help="build programs and images, which all else does when it must")
    commands.add_parser("down", help="end it; nothing is left but caches")
    commands.add_parser("status", help="what runs")
    test = commands.add_parser("test", help="run upstream's tests with each proxy, and compare")
    test.add_argument("--proxy", choices=proxies.PROXIES, action="append", help="default: vcproxy and kube-proxy")
    test.add_argument("--nodes", type=int, default=6, choices=range(1, 10), metavar="1..9")
    test.add_argument("--write", action="store_true", help="write the document about it anew")
    test.add_argument("--logs", type=Path, help="an empty folder for logs, which stay; default: they go")
    test.add_argument("focus", nargs="*", default=[upstream.SIG_NETWORK], help="regular expressions")
    enter = commands.add_parser("enter", help="run a command, by default a shell, on a machine: control, n1, n2, ...")
    enter.add_argument("machine")
    enter.add_argument("argv", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    match arguments.command:
        case "up":
            return up(arguments.proxy, arguments.nodes)
        case "keep":
            return keep(arguments.proxy, arguments.nodes)
        case "build":
            images.with_vcproxy(assets().store, CACHE)
            return 0
        case "down":
            return down()
        case "test":
            with ExitStack() as stack:
                logs = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vcp-upstream-")))
                chosen = arguments.proxy or proxies.DAEMONS
                return test_suites(chosen, logs, arguments.nodes, arguments.focus, write=arguments.write)
        case "status":
            return enter_machine("control", ["kubectl", "get", "nodes,pods", "--all-namespaces", "--output=wide"])
    return enter_machine(arguments.machine, arguments.argv or ["bash"])


def up(proxy: str, nodes: int) -> int:
    if facts() is not None:
        return fail("it is up already: python -m e2e.cluster down")
    _FACTS.unlink(missing_ok=True)
    command = [sys.executable, "-m", "e2e.cluster", "keep", f"--proxy={proxy}", f"--nodes={nodes}"]
    with _LOG.open("w") as log:
        keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        eventually(lambda: keeper.poll() is not None or _FACTS.exists(), within=_UP_WITHIN, every=0.1)
    except BaseException:
        keeper.terminate()
        raise
    if keeper.poll() is not None:
        return fail(f"it did not start:\n{_LOG.read_text()}")
    return enter_machine("control", ["kubectl", "get", "nodes", "--output=wide"])


def keep(proxy: str, nodes: int) -> int:
    """Be the keeper: hold the cluster until SIGTERM."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        directory = HOME / "logs"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        over = threading.Event()  # noticed when the cluster is up, so that nothing is interrupted half way
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: over.set())
        with Cluster(directory, proxy=proxy, nodes=nodes) as cluster:
            machines = [cluster.control.machine, *(node.machine for node in cluster.nodes)]
            content = {
                "keeper": os.getpid(),
                "machines": {machine.name: machine.pid for machine in machines},
                "kubeconfig": str(cluster.control.admin),
                "programs": str(cluster.assets.programs["kubectl"].parent),
            }
            part = _FACTS.with_suffix(".part")
            part.write_text(json.dumps(content))
            part.rename(_FACTS)
            over.wait()
        _FACTS.unlink()
    return 0


def test_suites(proxies: Sequence[str], logs: Path, nodes: int, focus: Sequence[str], *, write: bool) -> int:
    console, errors = Console(), Console(stderr=True)
    tell = partial(errors.print, style="dim")
    outcomes = comparison.perform(proxies, logs, nodes=nodes, focus=focus, tell=tell)
    console.print(comparison.drawn(outcomes))
    for result in (wrong := comparison.wrong(outcomes)):
        console.print(f"failed: {result.test}: {result.message}", markup=False, soft_wrap=True, highlight=False)
    for line in comparison.counts(outcomes):
        console.print(line)
    if write:
        comparison.DOCUMENT.write_text(comparison.document(outcomes, nodes=nodes))
    return int(bool(wrong))


def down() -> int:
    known = facts()
    if known is None:
        return fail("it is not up")
    os.kill(known["keeper"], signal.SIGTERM)
    eventually(lambda: facts() is None, within=120.0, every=0.05)
    return 0


def enter_machine(name: str, argv: list[str]) -> int:
    known = facts()
    if known is None:
        return fail("it is not up: python -m e2e.cluster up")
    if name not in known["machines"]:
        return fail(f"no machine {name}: want one of {', '.join(known['machines'])}")
    os.environ["KUBECONFIG"] = known["kubeconfig"]
    os.environ["PATH"] = f"{known['programs']}:{os.environ['PATH']}"
    return subprocess.call(inside(known["machines"][name], *argv))


def facts() -> dict[str, Any] | None:
    """What the keeper has written down; None if no keeper lives or its cluster is not up yet."""
    if not _FACTS.exists():
        return None
    with _LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            known: dict[str, Any] = json.loads(_FACTS.read_text())
            return known
    return None


def fail(words: str) -> int:
    print(f"e2e.cluster: {words}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
