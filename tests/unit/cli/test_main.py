"""The command line: every command explains itself, errors are one line with a cure."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import yaml
from click.testing import CliRunner

from vcproxy.cli.main import COMMANDS, main
from vcproxy.ops import admin


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Daemons configure the process's logging, and here to a stream that is closed afterwards."""
    yield
    structlog.reset_defaults()


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
        (["run", "--cluster-cidr", "10.0.0.0/99", "--tenants", "t"], "--cluster-cidr: '10.0.0.0/99' is no CIDR"),
        (["run", "--config", "/none.yaml"], "--config /none.yaml: cannot be read"),
        (["run", "--no-super-cluster", "--tenants", "t", "--take-over"], "nobody would serve what kube-proxy serves"),
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


@pytest.mark.parametrize(
    ("arguments", "masquerade"),
    [
        (["--masquerade-all"], True),
        (["--masquerade-all=true"], True),
        (["--masquerade_all=false"], False),
        (
            [
                "--masquerade-all",
                "--v=2",
                "-v",
                "3",
                "-v=4",
                "--nodeport-addresses=primary",
                "--nodeport-addresses",
                "all",
            ],
            True,
        ),
        ([], False),
    ],
    ids=str,
)
def test_run_reads_flags_as_kube_proxy_does(arguments: list[str], masquerade: bool, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["run", "--write-config-to", str(tmp_path / "made"), *arguments])
    assert result.exit_code == 0, result.output
    made = yaml.safe_load((tmp_path / "made").read_text())
    assert made["kind"] == "KubeProxyConfiguration"
    assert made["nftables"]["masqueradeAll"] is masquerade
    if "-v=4" in arguments:
        assert made["logging"]["verbosity"] == 4
        assert made["nodePortAddresses"] == ["primary", "all"]


STATUS = {
    "role": "node", "node": "one", "healthy": False, "brain": None, "problems": [{"problem": "disk full"}],
    "tenants": [{"uid": "dir-acme", "name": "[red]acme", "revision": 3, "staleSince": 1.0, "rejections": {"a/b": "why"}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        (
            {
                "role": "brain",
                "sharding": {"brains": {"host-1": [0, 1, 2, 5], "host-2": [3, 4]}, "nobodys": [6]},
            },
            ["host-1 0-2, 5", "host-2 3-4", "nobody 6"],
        ),
        (
            {
                "role": "node",
                "brains": [
                    {"address": "192.0.2.1:7443", "brain": "ab", "tenants": 3, "disconnected": None},
                    {"address": "192.0.2.2:7443", "brain": None, "tenants": 0, "disconnected": "refused"},
                ],
            },
            ["192.0.2.1:7443 ab 3 -", "192.0.2.2:7443 - 0 refused"],
        ),
    ],
    ids=["brain", "node"],
)
def test_status_shows_who_has_which_shards(
    answer: dict[str, object], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(path: str, route: str, parameters: object = None) -> object:
        return {"healthy": True, "problems": [], "tenants": [], **answer}

    monkeypatch.setattr(admin, "fetch", fetch)
    result = CliRunner().invoke(main, ["status", "--socket", str(tmp_path / "x")])
    assert result.exit_code == 0, result.output
    shown = [" ".join(line.split()) for line in result.output.splitlines()]
    assert [line for line in lines if line not in shown] == [], result.output


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


def test_importing_a_command_leaves_the_environment_and_the_collector_as_they_were() -> None:
    """aiohttp is not to read the system's CAs; what we connect to with them must."""
    code = (
        "import gc, os, ssl, sys, click\n"
        "os.environ['SSL_CERT_DIR'] = '/somewhere'\n"
        "os.environ.pop('SSL_CERT_FILE', None)\n"
        "from vcproxy.cli.main import main\n"
        "main.get_command(click.Context(main), 'run')\n"
        "import aiohttp.connector\n"
        "assert not aiohttp.connector._SSL_CONTEXT_VERIFIED.get_ca_certs()\n"
        "assert gc.isenabled() and 'rich' not in sys.modules and 'cryptography' not in sys.modules\n"
        "assert os.environ['SSL_CERT_DIR'] == '/somewhere' and 'SSL_CERT_FILE' not in os.environ\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
