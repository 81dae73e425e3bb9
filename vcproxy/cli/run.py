"""`vcproxy run`: brain and node agent in one process, in kube-proxy's place on one node.

All of kube-proxy's flags and its configuration file are understood; what they mean is `vcproxy.kubeproxy`'s business.
The two halves say what they always say, message by message; only how the octets travel differs (see inprocess): gRPC
with TLS in one process was two fifths of the processor time that a change takes.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
import msgspec

from vcproxy.brain.config import BrainConfiguration
from vcproxy.cli.daemons import run_daemon
from vcproxy.cli.main import Failure, version
from vcproxy.kubeproxy import flags, judging, leftovers, reading, takeover, translation
from vcproxy.kubeproxy.configuration import GROUP, KubeProxyConfiguration, external
from vcproxy.kubeproxy.flags import Flag
from vcproxy.kubeproxy.reading import Read, Warned
from vcproxy.kubeproxy.translation import Surroundings
from vcproxy.model.tenant import SUPER_UID
from vcproxy.node.config import NodeConfiguration
from vcproxy.ops import logs, stopping
from vcproxy.ops.configfile import ConfigError

CONFIG_POLL_SECONDS = 5.0

log = logs.get("run")

Given = Mapping[str, Sequence[str]]
"""Values of kube-proxy's flags by name, in the order given."""


class Options(NamedTuple):
    """vcproxy's own flags."""

    tenants: str
    no_super_cluster: bool
    take_over: bool
    state_directory: str
    runtime_directory: str


def _kube_proxy_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for flag in reversed(flags.ALL):
        command = _option(flag)(command)
    return command


def _option(flag: Flag) -> Callable[..., Any]:
    """All values are text here and read in one place, so that errors look alike. A switch needs no value."""
    names = [flag.option, _parameter(flag)] + (["-v"] if flag.name == "v" else [])
    if flag.is_switch:
        look: dict[str, Any] = {"is_flag": False, "flag_value": "true", "metavar": "[BOOL]"}
    else:
        look = {"metavar": "N" if flag.kind in (flags.integer, flags.decimal, flags.level) else "TEXT"}
    return click.option(*names, multiple=True, help=flag.help, hidden=flag.hidden, **look)


def _parameter(flag: Flag) -> str:
    return "kp_" + flag.name.replace("-", "_")


@click.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
@click.option("--tenants", default="", help="Folder with NAME.kubeconfig or NAME/*.yaml a tenant.")
@click.option("--no-super-cluster", is_flag=True, help="Proxy only the tenants of --tenants.")
@click.option("--take-over", is_flag=True, help="Remove what a kube-proxy left, once all is programmed; see below.")
@click.option("--state-directory", default="/var/lib/vcproxy", show_default=True, type=click.Path(file_okay=False))
@click.option("--runtime-directory", default="/run/vcproxy", show_default=True, type=click.Path(file_okay=False))
@click.option("--version", "show_version", is_flag=False, flag_value="true", default=None, help="Print it, and end.")
@_kube_proxy_flags
def run(
    tenants: str,
    no_super_cluster: bool,
    take_over: bool,
    state_directory: str,
    runtime_directory: str,
    show_version: str | None,
    **values: tuple[str, ...],
) -> None:
    """Run brain and node agent in one process: the drop-in for kube-proxy on one node.

    All of kube-proxy's flags (1.37) are understood. What has no effect here is named in a warning, with the reason.

    \b
    Examples:
      vcproxy run --config=/var/lib/kube-proxy/config.conf --hostname-override=$NODE_NAME
      vcproxy run --kubeconfig /var/lib/kube-proxy/kubeconfig.conf --cluster-cidr 10.244.0.0/16 --take-over
      vcproxy run --no-super-cluster --tenants ./tenants
      vcproxy run --config=/var/lib/kube-proxy/config.conf --init-only     # privileged; later with CAP_NET_ADMIN
      vcproxy run --cleanup

    --take-over: rules that a kube-proxy of any mode left on this node stay until vcproxy has programmed the super
    cluster's Services, and are removed then; connections live on. A kube-proxy that still runs is named, and waited
    for: stop it.
    """
    if show_version is not None and show_version != "false":
        click.echo(f"vcproxy {version()}")
        return
    given = {flag.name: values[_parameter(flag)] for flag in flags.ALL if values[_parameter(flag)]}
    options = Options(tenants, no_super_cluster, take_over, state_directory, runtime_directory)
    try:
        _run(given, options)
    except ConfigError as error:
        raise Failure(str(error)) from error


def _run(given: Given, options: Options) -> None:
    file = _action(given, "config")
    read = flags.over_file(reading.read_file(Path(file)), given) if file else flags.from_flags(given)
    config = read.config
    judging.check(config, read.origin)
    logs.configure(translation.log_level(config), config.logging.format)
    if target := _action(given, "write-config-to"):
        _write(config, Path(target))
        return
    if _switched(given, "cleanup"):
        _clean(options)
        return
    _warn((*read.warned, *judging.warnings(config, read.origin)))
    if _switched(given, "init-only"):
        _initialise(config)
        return
    if options.no_super_cluster and not options.tenants:
        raise ConfigError("--no-super-cluster leaves nothing to proxy: give --tenants DIRECTORY")
    if options.no_super_cluster and options.take_over:
        raise ConfigError("--take-over with --no-super-cluster: nobody would serve what kube-proxy serves; drop one")
    _serve(read, options, master=_action(given, "master"), file=file)


def _action(given: Given, name: str) -> str:
    return given[name][-1] if name in given else ""


def _switched(given: Given, name: str) -> bool:
    flag = next(flag for flag in flags.ACTIONS if flag.name == name)
    return name in given and bool(flags.parsed(flag, given[name]))


def _warn(warned: Iterable[Warned]) -> None:
    for warning in warned:
        log.warning("a setting without its effect", setting=warning.where, why=warning.why)


def _write(config: KubeProxyConfiguration, path: Path) -> None:
    try:
        path.write_bytes(msgspec.yaml.encode(external(config)))
    except OSError as error:
        raise ConfigError(f"--write-config-to {path}: {error.strerror}") from error
    log.info("wrote the configuration", file=str(path))


def _clean(options: Options) -> None:
    from vcproxy.cli.cleanup import clean

    clean("nftables", Path(options.state_directory))
    found = leftovers.find()
    takeover.warn(leftovers.Leftovers(processes=found.processes), taking_over=True)
    try:
        leftovers.remove(found)
    except leftovers.LeftoverError as error:
        raise Failure(str(error)) from error
    for rule in found.rules:
        click.echo(f"removed {rule}")
    if found.unknown:
        raise Failure(f"of kube-proxy something may be left; run `kube-proxy --cleanup`: {'; '.join(found.unknown)}")
    click.echo("cleaned up")


def _initialise(config: KubeProxyConfiguration) -> None:
    """What later needs more than CAP_NET_ADMIN: sysctls and kernel modules. The table is what loads the modules."""
    from vcproxy.backend import registry
    from vcproxy.backend.protocol import BackendError
    from vcproxy.node import sysctls

    backend = registry.create("nftables", {})
    try:
        backend.open()
        backend.close()
    except BackendError as error:
        raise Failure(str(error)) from error
    sysctls.apply(translation.conntrack(config))
    log.info("initialised; run again without --init-only, CAP_NET_ADMIN is enough")


def _serve(read: Read, options: Options, *, master: str, file: str) -> None:
    import uvloop

    config, runtime = read.config, Path(options.runtime_directory)
    try:
        runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--runtime-directory {runtime}: {error.strerror}") from error
    _adjust_oom_score(config.oom_score_adj or 0)
    takeover.warn(leftovers.find(), taking_over=options.take_over)
    around = Surroundings(
        node=config.hostname_override.strip().lower() or socket.gethostname().lower(),
        state_directory=options.state_directory,
        runtime_directory=options.runtime_directory,
        tenants=options.tenants,
        super_cluster=not options.no_super_cluster,
        master=master,
    )
    brain, agent = translation.configurations(config, around)
    os.umask(0o077)
    run_daemon(
        lambda: _both(brain, agent, config, take_over=options.take_over, file=Path(file) if file else None),
        loop=uvloop.new_event_loop,
    )


def _adjust_oom_score(score: int) -> None:
    """As kube-proxy: lowering it needs CAP_SYS_RESOURCE, and going on without is better than not to go on."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError as error:
        log.info("the OOM score stays as it is", wanted=score, reason=error.strerror)


async def _both(
    brain: BrainConfiguration,
    node: NodeConfiguration,
    config: KubeProxyConfiguration,
    *,
    take_over: bool,
    file: Path | None,
) -> None:
    from vcproxy.brain.service import Brain
    from vcproxy.brain.superaccess import credentials_of
    from vcproxy.cli import inprocess
    from vcproxy.node.service import NodeAgent
    from vcproxy.ops.events import EventRecorder

    cluster = brain.super_cluster
    recorder = EventRecorder(lambda: credentials_of(cluster), host=node.node_name) if cluster else None
    half = Brain(brain, listening=False)
    way = inprocess.connect(half.distributor, node.node_name)
    agent = NodeAgent(node, events=recorder, shown={GROUP: external(config)}, connect=way)
    with stopping.signals() as stop:

        async def first_things_first() -> None:
            # The brain would compete for the interpreter with what has kept all connections alive meanwhile.
            if agent.remembers:
                await agent.started.wait()
            await half.run(stop)

        async def serve() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(first_things_first())
                group.create_task(agent.run(stop))
                if take_over:
                    group.create_task(takeover.take_over(lambda: agent.has_programmed(SUPER_UID), agent.not_served))
                if file is not None:
                    group.create_task(_until_changed(file))

        await stopping.until_stopped(serve, stop)


async def _until_changed(file: Path) -> NoReturn:
    """As kube-proxy: a configuration file that changed ends the process, and whoever started it starts it anew."""
    started_with = file.read_bytes()
    while True:
        await asyncio.sleep(CONFIG_POLL_SECONDS)
        try:
            changed = file.read_bytes() != started_with
        except OSError:
            continue  # A ConfigMap is replaced by way of links; a file that is gone for good changes nothing.
        if changed:
            raise ConfigError(f"--config {file} changed; ended, to be started again with what it says now")
