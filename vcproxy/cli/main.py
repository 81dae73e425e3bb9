"""`vcproxy`: one executable, one command a module.

Commands are imported when they are called: an agent does not pay for the demo's imports, nor `get` for grpc's.
"""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

COMMANDS = {
    "brain": "vcproxy.cli.daemons",
    "node": "vcproxy.cli.daemons",
    "run": "vcproxy.cli.run",
    "demo": "vcproxy.cli.demo",
    "check": "vcproxy.cli.check",
    "cleanup": "vcproxy.cli.cleanup",
    "get": "vcproxy.cli.look",
    "status": "vcproxy.cli.look",
    "explain": "vcproxy.cli.look",
    "config": "vcproxy.cli.config",
}


class LazyGroup(click.Group):
    """A group whose commands are attributes of the modules in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        with _importing():
            command: click.Command = getattr(importlib.import_module(module), cmd_name)
        return command


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """A daemon's modules in three quarters of the time: no search for cycles in what is going to stay, and no reading
    of the system's CAs by aiohttp, for two contexts that we never use."""
    nowhere = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}
    before = {name: os.environ.get(name) for name in nowhere}
    gc.disable()
    os.environ.update(nowhere)
    try:
        yield
    finally:
        gc.enable()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Failure(click.ClickException):
    """An error for people: printed in one line, exit status 1."""

    def show(self, file: Any = None) -> None:
        click.secho(f"vcproxy: {self.format_message()}", file=file or sys.stderr, err=True, fg="red")


def version() -> str:
    """The installed version."""
    from importlib import metadata

    return metadata.version("vcproxy")


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vcproxy", prog_name="vcproxy")
def main() -> None:
    """The Service proxy for clusters whose nodes are shared by many tenant control planes.

    \b
    See it work on this machine, as root:   vcproxy demo
    What is wrong with this node?           vcproxy check
    What do brain and nodes hold?           vcproxy status; vcproxy get services
    Why does a Service not answer?          vcproxy explain SERVICE --tenant T
    """


if __name__ == "__main__":
    main()
