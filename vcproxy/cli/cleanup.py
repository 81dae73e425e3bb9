"""`vcproxy cleanup`: leave no trace on this node."""

import shutil
from pathlib import Path

import click

from vcproxy.backend import registry
from vcproxy.backend.protocol import BackendError
from vcproxy.cli.main import Failure


@click.command()
@click.option("--backend", default="nftables", show_default=True, help="The backend to clean up after.")
@click.option(
    "--state-directory", default="/var/lib/vcproxy", show_default=True, type=click.Path(), help="Last good state."
)
@click.option("--keep-state", is_flag=True, help="Keep the last good state on disk.")
def cleanup(backend: str, state_directory: str, keep_state: bool) -> None:
    """Remove all that vcproxy put on this node: its table, its tenants' connections, its state on disk.

    Other tables are neither read nor written (`vcproxy run --cleanup` removes what kube-proxy left, too). Stop the node
    agent first, or it puts everything back within a second.
    """
    clean(backend, None if keep_state else Path(state_directory))
    click.echo("cleaned up")


def clean(backend: str, state: Path | None) -> None:
    """Do it; `state`: the folder to remove, None for none. Raises Failure."""
    try:
        registry.create(backend, {}).cleanup()
    except BackendError as error:
        raise Failure(str(error)) from error
    if state is not None and state.is_dir():
        shutil.rmtree(state)
