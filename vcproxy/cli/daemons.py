"""`vcproxy brain` and `vcproxy node`: the two daemons."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from vcproxy.backend.protocol import BackendError
from vcproxy.cli.main import Failure
from vcproxy.ops import configfile, garbage, logs
from vcproxy.ops.admin import AdminError

# Exceptions whose message is written for people; anything else is a fault of ours and shows its traceback.
EXPECTED = (configfile.ConfigError, AdminError, BackendError, OSError)

SWITCH_SECONDS = 0.0002
"""How long a thread of gRPC's waits for the interpreter while the event loop is busy.

Each message written waits for that once. Python's own 5 ms would be most of its latency, and 0.2 ms cost no processor
time that shows.
"""

_config = click.option(
    "--config", "file", required=True, type=click.Path(dir_okay=False), help="Configuration file (YAML)."
)


@click.command()
@_config
def brain(file: str) -> None:
    """Watch every tenant's Services and stream the compiled model to the nodes.

    \b
    Example:
      vcproxy config default BrainConfiguration > brain.yaml
      vcproxy brain --config brain.yaml
    """
    import uvloop

    from vcproxy.brain.config import BrainConfiguration
    from vcproxy.brain.service import Brain

    configuration = read(file, BrainConfiguration)
    logs.configure(configuration.log_level, configuration.log_format)
    run_daemon(lambda: Brain(configuration).run(), loop=uvloop.new_event_loop)


@click.command()
@_config
def node(file: str) -> None:
    """Program this node's Service forwarding from what the brain streams.

    \b
    Example:
      vcproxy config default NodeConfiguration > node.yaml
      vcproxy node --config node.yaml
    """
    from vcproxy.node.config import NodeConfiguration
    from vcproxy.node.service import NodeAgent

    configuration = read(file, NodeConfiguration)
    logs.configure(configuration.log_level, configuration.log_format)
    run_daemon(lambda: NodeAgent(configuration).run())


def read(file: str, kind: type[configfile.T]) -> configfile.T:
    """A configuration file, or a Failure that names the place."""
    try:
        return configfile.load(Path(file), kind)
    except configfile.ConfigError as error:
        raise Failure(str(error)) from error


def run_daemon(start: Callable[[], Coroutine[Any, Any, None]], *, loop: Any = None) -> None:
    """Run until the daemon ends; expected errors become one line and exit status 1."""
    # Our logs say when a stream ends; gRPC's own lines have no tenant, no node and no level.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    garbage.tune()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(start())
    except* EXPECTED as group:
        raise Failure("; ".join(str(error) for error in leaves(group))) from None


def leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    """The exceptions inside nested groups."""
    found: list[Exception] = []
    for error in group.exceptions:
        found.extend(leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
