"""From `tenants.sources` of the configuration to sources."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vcproxy.brain.config import HostedSource, TenantSource
from vcproxy.brain.sources import Source
from vcproxy.brain.sources.attribution import VIRTUAL_CLUSTER, Owners
from vcproxy.brain.sources.clusterapi import ClusterAPI, K0smotron
from vcproxy.brain.sources.directory import DirectorySource
from vcproxy.brain.sources.hosted import HostedTenants
from vcproxy.brain.sources.hypershift import HyperShift
from vcproxy.brain.sources.kamaji import Kamaji
from vcproxy.brain.sources.project import Project
from vcproxy.brain.sources.vcluster import VCluster
from vcproxy.brain.sources.virtualcluster import SyncedServices, VirtualClusters
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.brain.vouched import Vouched
from vcproxy.ops.configfile import ConfigError

PROJECTS: dict[str, Project[Any]] = {
    project.title: project
    for project in (VirtualClusters(), ClusterAPI(), Kamaji(), K0smotron(), HyperShift(), VCluster())
}
"""By their fields in the configuration."""


def made(
    configured: Iterable[TenantSource], access: SuperAccess | None, owners: Owners, vouched: Vouched
) -> list[Source]:
    """The sources, in the order of the configuration. Raises ConfigError, which names the entry."""
    sources: list[Source] = []
    titles: set[str] = set()
    for at, entry in enumerate(configured):
        where = f"tenants.sources[{at}]"
        title, said = _chosen(entry, where)
        if entry.directory is not None:
            sources.append(DirectorySource(Path(entry.directory.path)))
            continue
        if title in titles:
            raise ConfigError(f"{where}: {title} is there twice: one entry finds all its tenants; remove this one")
        if access is None:
            raise ConfigError(f"{where}: {title} is found in the super cluster: set superCluster, or remove it")
        titles.add(title)
        synced = (SyncedServices(owners, vouched),) if title == VirtualClusters.title else ()
        namespaces = said.namespaces if isinstance(said, HostedSource) else ()
        project = PROJECTS[title]
        sources.append(HostedTenants(project, access, owners, namespaces=namespaces, followers=synced))
    return sources


def spoken_for(configured: Iterable[TenantSource]) -> tuple[str, ...]:
    """The marks (attribution.py) that are not the directory's with these sources."""
    return (VIRTUAL_CLUSTER,) if any(entry.virtual_cluster is not None for entry in configured) else ()


def _chosen(entry: TenantSource, where: str) -> tuple[str, Any]:
    chosen = {
        name: said
        for name, field in zip(entry.__struct_encode_fields__, entry.__struct_fields__, strict=True)
        if (said := getattr(entry, field)) is not None
    }
    if len(chosen) != 1:
        raise ConfigError(f"{where}: set exactly one of {', '.join(entry.__struct_encode_fields__)}")
    return next(iter(chosen.items()))
