"""`vcproxy check`: is this node fit for vcproxy, and if not, what to do."""

import click
from rich.console import Console
from rich.markup import escape

from vcproxy.cli.output import output_option, show
from vcproxy.node.preflight import State, preflight, this_machine

_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.ERROR: "red"}


@click.command()
@output_option
def check(output: str) -> None:
    """Check this node: privileges, kernel, nft, sysctls, rivals; each finding with its cure.

    Exit status 1 when something keeps vcproxy from working. Changes nothing.

    \b
    Examples:
      vcproxy check
      vcproxy check -o json | jq '.[] | select(.state != "ok")'
    """
    findings = preflight(this_machine())
    if output == "table":
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            state = f"[{_COLOURS[finding.state]}]{finding.state:8}[/]"
            console.print(f"{state} {finding.name}: {escape(finding.found)}")
            if finding.cure:
                console.print(f"         {escape(finding.cure)}")
    else:
        show(findings, output)
    if any(finding.state is State.ERROR for finding in findings):
        raise SystemExit(1)
