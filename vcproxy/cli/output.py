"""Tables where people look, JSON and YAML where programs read."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

FORMATS = ("table", "json", "yaml")


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option `-o`."""
    return click.option(
        "-o", "--output", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print."
    )(command)


def show(value: Any, output: str) -> None:
    """Print plain data as JSON or YAML."""
    if output == "yaml":
        sys.stdout.write(msgspec.yaml.encode(value).decode())
    else:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, title: str | None = None) -> None:
    """Print rows as a table: one column a key. Plain text when the output is no terminal."""
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    drawn = Table(*(_heading(column) for column in columns), title=title, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        drawn.add_row(*(_cell(row.get(column)) for column in columns))
    if not sys.stdout.isatty():
        console.width = 4096
    console.print(drawn)


def _heading(key: str) -> str:
    return "".join(f" {letter}" if letter.isupper() else letter for letter in key).upper()


def _cell(value: Any) -> str:
    # Markup in a name that a tenant chose must not colour or hide anything.
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, list | tuple):
        value = (value,)
    return (",".join(str(item) for item in value) or "-").replace("[", "\\[")
