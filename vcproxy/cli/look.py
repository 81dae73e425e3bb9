"""`vcproxy status`, `vcproxy get` and `vcproxy explain`: what brain and node hold, read from the admin socket."""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vcproxy.cli.main import Failure
from vcproxy.cli.output import output_option, show, table
from vcproxy.ops import admin

SOCKETS = ("/run/vcproxy/brain.sock", "/run/vcproxy/node.sock")
COLUMNS: Mapping[str, Sequence[str]] = {
    "tenants": ("uid", "name", "revision", "synced", "staleSince", "ports", "endpoints", "refused", "digest"),
    "services": ("tenant", "namespace", "service", "port", "protocol", "frontends", "endpoints"),
    "endpoints": ("tenant", "namespace", "service", "port", "protocol", "endpoint", "node", "conditions"),
    "frontends": ("tenant", "frontend", "kind", "namespace", "service", "port", "protocol"),
    "nodes": ("node", "connectedSince", "agent", "tenants", "behind", "rejections"),
}

_socket = click.option(
    "--socket",
    "path",
    type=click.Path(),
    help=f"Admin socket; default: the first that exists of {', '.join(SOCKETS)}.",
)


@click.command()
@click.argument("what", type=click.Choice(list(COLUMNS)))
@click.option("--tenant", "-t", help="Only this tenant (uid or name).")
@_socket
@output_option
def get(what: str, tenant: str | None, path: str | None, output: str) -> None:
    """List what the brain or the node on this machine holds.

    \b
    Examples:
      vcproxy get tenants
      vcproxy get services --tenant acme
      vcproxy get endpoints -o json | jq '.[].endpoint'
    """
    rows = _fetch(path, f"/{what}", {"tenant": tenant} if tenant else None)
    if output == "table":
        table(map(_readable, rows), COLUMNS[what])
    else:
        show(rows, output)


@click.command()
@_socket
@output_option
def status(path: str | None, output: str) -> None:
    """Show how brain, nodes and tenants are: revisions sent, received and committed, and what is stale.

    Exit status 1 when a tenant is stale or not synced, or a service port is rejected.

    \b
    Examples:
      vcproxy status
      vcproxy status --socket /run/vcproxy/node.sock -o json
    """
    answer = _fetch(path, "/status", None)
    if output == "table":
        _print_status(answer)
    else:
        show(answer, output)
    if not answer["healthy"]:
        raise SystemExit(1)


@click.command()
@click.argument("service")
@click.option("--tenant", "-t", required=True, help="Whose Service (uid or name; `super`: the super cluster's).")
@click.option("--namespace", "-n", default="default", show_default=True, help="The Service's namespace.")
@_socket
@output_option
def explain(service: str, tenant: str, namespace: str, path: str | None, output: str) -> None:
    """Show what one Service of a tenant leads to, and what of it is refused, why, and what to do. Asks the brain.

    \b
    Examples:
      vcproxy explain web --tenant acme
      vcproxy explain web -t acme -n shop -o json
    """
    answer = _fetch(path, "/explain", {"tenant": tenant, "namespace": namespace, "service": service})
    if output == "table":
        _print_explanation(answer)
    else:
        show(answer, output)


def _print_explanation(answer: Mapping[str, Any]) -> None:
    whose = f"{answer['tenant']} ({answer['name']})"
    click.echo(f"Service {answer['namespace']}/{answer['service']} of tenant {whose}")
    if answer["staleSince"]:
        click.secho(f"stale for {age(time.time() - answer['staleSince'])}: {answer['staleReason']}", fg="yellow")
    if answer["degraded"]:
        click.secho("degraded: the tenant is at its limits, new objects are refused", fg="yellow")
    if not answer["ports"]:
        click.secho("nothing of it is served", fg="yellow")
    for said in answer["virtual"]:
        click.echo(f"virtual address {said['address']}, by {said['by']}")
    for title, columns in (("ports", "services"), ("endpoints", "endpoints")):
        if answer[title]:
            click.echo()
            table(map(_readable, answer[title]), COLUMNS[columns][3:])
    if answer["refused"] or answer["rejections"]:
        click.echo()
    for said in answer["refused"]:
        several = f" and {said['count'] - 1} more" if said["count"] > 1 else ""
        where = f"{said['kind']} {said['name']}: {said['field']} {said['value']}{several}"
        click.secho(f"refused: {where}: {said['reason']}; {said['cure']}", fg="red")
    for said in answer["refusedEndpoints"]:
        click.secho(f"refused endpoint: {said['address']} ({said['slice']}): {said['reason']}", fg="red")
    for said in answer["rejections"]:
        click.secho(f"rejected by node {said['node']}: {said['port']}: {said['reason']}", fg="red")


TENANTS = ("uid", "name", "synced", "revision", "ports", "endpoints", "refused", "staleSince", "staleReason")
ON_NODE = ("uid", "name", "synced", "revision", "committedRevision", "committedAt", "rejected", "staleSince", "error")
BRAINS = ("address", "brain", "tenants", "disconnected")
SHARES = ("brain", "shards")
STREAMS = ("node", "connectedSince", "tenant", "sent", "received", "committed", "current", "lagSeconds", "rejections")


def _print_status(answer: Mapping[str, Any]) -> None:
    facts = {key: value for key, value in answer.items() if not isinstance(value, list | dict) and value is not None}
    click.echo(f"{facts.pop('role')}: " + ", ".join(f"{key} {_plain(value)}" for key, value in facts.items()))
    for found in answer["problems"]:
        click.secho(f"problem: {found['problem']}", fg="yellow")
    if sharding := answer.get("sharding"):
        click.echo()
        rows = [{"brain": name, "shards": _ranges(shards)} for name, shards in sharding["brains"].items()]
        table([*rows, {"brain": "nobody", "shards": _ranges(sharding["nobodys"])}], SHARES)
    if answer.get("brains"):
        click.echo()
        table(answer["brains"], BRAINS)
    if answer["tenants"]:
        click.echo()
        table(map(_readable, answer["tenants"]), TENANTS if answer["role"] == "brain" else ON_NODE)
    for row in answer["tenants"]:
        for key, reason in row.get("rejections", {}).items():
            click.secho(f"rejected: {row['uid']} {key}: {reason}", fg="red")
        if row.get("behind"):
            click.secho(f"behind: {row['uid']}: {row['behind']}", fg="yellow")
    if answer.get("nodes"):
        click.echo()
        table(map(_readable, _streams(answer["nodes"])), STREAMS)
    for node in answer.get("nodes", ()):
        for uid, row in node["byTenant"].items():
            if row["behind"]:
                click.secho(f"behind node {node['node']}: {uid}: {row['behind']}", fg="yellow")


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7: sorted numbers, those in a row together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _streams(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Tenants x nodes, one row each; a node without tenants has a row of its own."""
    for node in nodes:
        facts = {"node": node["node"], "connectedSince": node["connectedSince"]}
        yield from (
            {**facts, **row, "tenant": uid, "lagSeconds": row["lag_seconds"], "rejections": len(row["rejections"])}
            for uid, row in node["byTenant"].items()
        )
        if not node["byTenant"]:
            yield facts


def _readable(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Digests short, times as ages."""
    return {key: _text(value, key) for key, value in row.items()}


def _text(value: Any, key: str) -> Any:
    if key == "digest":
        return value[:12]
    if key.endswith(("Since", "At")) and value:
        return age(time.time() - value)
    return value


def _plain(value: Any) -> Any:
    return ("no", "yes")[value] if isinstance(value, bool) else value


def age(seconds: float) -> str:
    """`42s`, `7m`, `3h`, `2d`: as kubectl prints ages."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _fetch(path: str | None, route: str, parameters: Mapping[str, str] | None) -> Any:
    if path is None:
        path = next((candidate for candidate in SOCKETS if Path(candidate).is_socket()), None)
        if path is None:
            raise Failure(f"no vcproxy runs here (none of {', '.join(SOCKETS)} exists); --socket names another")
    try:
        return asyncio.run(admin.fetch(path, route, parameters))
    except admin.AdminError as error:
        raise Failure(str(error)) from error
