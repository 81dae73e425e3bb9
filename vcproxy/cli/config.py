"""`vcproxy config`: what can be configured."""

import click

from vcproxy.brain.config import BrainConfiguration
from vcproxy.cli.main import Failure
from vcproxy.node.config import NodeConfiguration
from vcproxy.ops import configfile

KINDS = {kind.__name__: kind for kind in (BrainConfiguration, NodeConfiguration)}


@click.group()
def config() -> None:
    """Configuration files: print a default one, check one.

    \b
    Examples:
      vcproxy config default BrainConfiguration > brain.yaml
      vcproxy config validate BrainConfiguration brain.yaml
    """


@config.command()
@click.argument("kind", type=click.Choice(list(KINDS), case_sensitive=False))
def default(kind: str) -> None:
    """Print a configuration file with every field, its default and what it means."""
    click.echo(configfile.describe(KINDS[kind]), nl=False)


@config.command()
@click.argument("kind", type=click.Choice(list(KINDS), case_sensitive=False))
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
def validate(kind: str, file: str) -> None:
    """Check a configuration file; exit status 1 and the place if something is wrong with it."""
    from pathlib import Path

    try:
        configfile.load(Path(file), KINDS[kind])
    except configfile.ConfigError as error:
        raise Failure(str(error)) from error
    click.echo(f"{file}: ok")
