"""The command line: every command explains itself, errors are one line with a cure."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vcproxy.cli.main import COMMANDS, main
from vcproxy.cli.run import configurations
from vcproxy.ops import admin


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_with_examples(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert command in ("check", "cleanup") or "Example" in result.output


def test_config_default_is_valid(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["config", "default", "NodeConfiguration"])
    (tmp_path / "node.yaml").write_text(printed.output)
    checked = CliRunner().invoke(main, ["config", "validate", "nodeconfiguration", str(tmp_path / "node.yaml")])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["brain", "--config", "/none.yaml"], "/none.yaml: cannot be read"),
        (["run", "--no-super-cluster"], "--no-super-cluster leaves nothing to proxy"),
        (["run", "--cluster-cidr", "10.0.0.0/99", "--tenants", "t"], "--cluster-cidr 10.0.0.0/99"),
        (["get", "tenants", "--socket", "/none.sock"], "is vcproxy running"),
        (["cleanup", "--backend", "none"], "there is no backend 'none'; installed: nftables"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "run":
        arguments = [*arguments, "--runtime-directory", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_run_makes_both_configurations(tmp_path: Path) -> None:
    flags = {
        "kubeconfig": "/k", "no_super_cluster": False, "tenants": "/t", "cluster_cidr": "10.244.0.0/16,fd00:244::/56",
        "detect_local_mode": "ClusterCIDR", "nodeport_addresses": "primary", "masquerade_all": True,
        "healthz_bind_address": "", "metrics_bind_address": "", "state_directory": "/s", "runtime_directory": "/r",
        "log_format": "json",
    }  # fmt: skip
    brain, node = configurations(flags, node="node-1", directory=tmp_path)
    assert brain.listen.address == node.brain.addresses[0]
    assert brain.super_cluster is not None
    assert brain.super_cluster.kubeconfig == "/k"
    assert node.detect_local.cluster_cidrs == ("10.244.0.0/16", "fd00:244::/56")
    assert node.masquerade_all
    assert (tmp_path / "node.key").stat().st_mode & 0o077 == 0
    without = configurations(flags | {"cluster_cidr": ""}, node="n", directory=tmp_path)[1]
    assert without.detect_local.mode == "None"


STATUS = {
    "role": "node", "node": "one", "healthy": False, "brain": None, "problems": [{"problem": "disk full"}],
    "tenants": [{"uid": "dir-acme", "name": "[red]acme", "revision": 3, "staleSince": 1.0, "rejections": {"a/b": "why"}}],
}  # fmt: skip


@pytest.mark.parametrize("output", ["table", "json", "yaml"])
def test_status_prints_what_the_socket_says(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(path: str, route: str, parameters: object = None) -> object:
        assert route == "/status"
        return STATUS

    monkeypatch.setattr(admin, "fetch", fetch)
    result = CliRunner().invoke(main, ["status", "--socket", str(tmp_path / "x"), "-o", output])
    assert result.exit_code == 1  # not healthy
    assert "[red]acme" in result.output  # a tenant's name is text, never markup
    assert "disk full" in result.output
    assert "why" in result.output
    if output == "json":
        assert json.loads(result.output) == STATUS
