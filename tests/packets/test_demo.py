"""`vcproxy demo` and `vcproxy run` as a user starts them: what they show, and that they leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vcproxy.lab import Lab, Reply, netns, tcp_request
from vcproxy.lab.cluster import endpoint_slice, service

pytestmark = pytest.mark.packets

VCPROXY = (sys.executable, "-m", "vcproxy")


def leftovers(pid: int) -> list[str]:
    """Namespaces of the demo that this process ran."""
    return [name for name in netns.names() if name.startswith(f"vcp-demo.{pid}.")]


def test_the_demo_shows_the_main_job() -> None:
    with subprocess.Popen([*VCPROXY, "demo", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err.decode()
    results = json.loads(out)
    assert len(results["reached"]) == 3 * 2 * 2 * 2  # tenants, nodes, protocols, families
    for row in results["reached"]:
        assert {name.split("/")[0] for name in row["answers"]} == {row["tenant"]}
    assert len({row["source"] for row in results["same_five_tuple"]}) == 1
    assert len({row["answered_by"].split("/")[0] for row in results["same_five_tuple"]}) == 3
    assert results["brain_killed"]["snapshots"] == results["brain_killed"]["operations"] == 0
    assert leftovers(process.pid) == []


def test_an_interrupted_demo_cleans_up() -> None:
    with subprocess.Popen([*VCPROXY, "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 60
        while len(leftovers(process.pid)) < 5 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted; everything is cleaned up" in out.decode()
    assert leftovers(process.pid) == []


def test_without_privilege_the_demo_says_so() -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-net_admin", *VCPROXY, "demo"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "CAP_NET_ADMIN not granted; in a container, run it with --privileged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_nft_the_demo_says_so(tmp_path: Path) -> None:
    (tmp_path / "ip").symlink_to("/usr/sbin/ip")
    (tmp_path / "bridge").symlink_to("/usr/sbin/bridge")
    done = subprocess.run(
        [*VCPROXY, "demo"], capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert "install the package nftables" in done.stderr


def test_run_serves_a_node_alone(tmp_path: Path) -> None:
    """Brain and agent in one process, tenants from a folder, pods told by their addresses."""
    with Lab("vcp-run") as lab:
        node = lab.node("one")
        client = node.flat_pod("acme/client", "10.200.1.10", "fd00:200:0:1::10")
        web = node.flat_pod("acme/web", "10.200.1.11", "fd00:200:0:1::11")
        lab.serve(web, tcp=[8080])
        folder = tmp_path / "tenants" / "acme"
        folder.mkdir(parents=True)
        manifests = [
            service("web", ["10.96.0.10"], [("http", "TCP", 80, 8080)]),
            endpoint_slice("web", "IPv4", [(web.ip4, "one")], [("http", "TCP", 8080)]),
            *(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": pod.name.split("/")[1], "namespace": "default"},
                    "spec": {"nodeName": "one"},
                    "status": {"phase": "Running", "podIPs": [{"ip": pod.ip4}, {"ip": pod.ip6}]},
                }
                for pod in (client, web)
            ),
        ]
        (folder / "all.yaml").write_text("---\n".join(json.dumps(manifest) + "\n" for manifest in manifests))
        command = [
            *VCPROXY, "run", "--no-super-cluster", "--tenants", str(tmp_path / "tenants"), "--hostname-override", "one",
            "--runtime-directory", str(tmp_path / "run"), "--state-directory", str(tmp_path / "state"),
            "--healthz-bind-address", "127.0.0.1:10256", "--metrics-bind-address", "",
        ]  # fmt: skip
        with (tmp_path / "log").open("wb") as log:
            process = node.spawn(command, stdout=log, stderr=log)
            deadline = time.monotonic() + 30
            while not isinstance(outcome := tcp_request(client, "10.96.0.10", 80, timeout=0.2), Reply):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (outcome, (tmp_path / "log").read_text())
                time.sleep(0.02)
            assert outcome.pod == "acme/web"
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0, (tmp_path / "log").read_text()
        # Fail static: what was programmed goes on.
        assert isinstance(tcp_request(client, "10.96.0.10", 80), Reply)
        node.run([*VCPROXY, "cleanup", "--state-directory", str(tmp_path / "state")])
        assert "vcproxy" not in node.run(["nft", "list", "tables"]).stdout
        assert not (tmp_path / "state").exists()
