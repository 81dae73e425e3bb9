"""`tenants.sources`: what may stand there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.apiserver import FakeApiServer
from vcproxy.brain.config import BrainConfiguration, SuperCluster
from vcproxy.brain.sources import catalogue
from vcproxy.brain.sources.attribution import VIRTUAL_CLUSTER, Owners
from vcproxy.brain.superaccess import SuperAccess
from vcproxy.brain.vouched import Vouched
from vcproxy.ops import configfile

HEADER = "apiVersion: vcproxy.dev/v1alpha1\nkind: BrainConfiguration\n"


def parsed(sources: str) -> BrainConfiguration:
    return configfile.parse(f"{HEADER}tenants: {{sources: {sources}}}", BrainConfiguration, source="brain.yaml")


@pytest.mark.parametrize(
    ("sources", "error"),
    [
        ("[{}]", r"tenants\.sources\[0\]: set exactly one of directory, virtualCluster, clusterAPI, kamaji"),
        ("[{directory: {}}, {kamaji: {}, k0smotron: {}}]", r"tenants\.sources\[1\]: set exactly one of"),
        ("[{kamaji: {}}, {kamaji: {}}]", r"tenants\.sources\[1\]: kamaji is there twice"),
    ],
)
async def test_entries_that_cannot_be_used(tmp_path: Path, sources: str, error: str) -> None:
    async with FakeApiServer() as api:
        (tmp_path / "super").write_bytes(api.kubeconfig())
        access = SuperAccess(SuperCluster(kubeconfig=str(tmp_path / "super")))
        with pytest.raises(configfile.ConfigError, match=error):
            catalogue.made(parsed(sources).tenants.sources, access, Owners(), Vouched())


def test_without_a_super_cluster_there_is_only_the_directory() -> None:
    with pytest.raises(configfile.ConfigError, match=r"tenants\.sources\[0\]: virtualCluster is found in the super"):
        catalogue.made(parsed("[{virtualCluster: {}}]").tenants.sources, None, Owners(), Vouched())
    assert catalogue.made(parsed("[{directory: {}}]").tenants.sources, None, Owners(), Vouched())


async def test_every_project_has_its_field(tmp_path: Path) -> None:
    entries = [f"{{{title}: {{}}}}" for title in catalogue.PROJECTS]
    configuration = parsed(f"[{', '.join(entries)}]")
    async with FakeApiServer() as api:
        (tmp_path / "super").write_bytes(api.kubeconfig())
        access = SuperAccess(SuperCluster(kubeconfig=str(tmp_path / "super")))
        made = catalogue.made(configuration.tenants.sources, access, Owners(), Vouched())
    assert len(made) == len(catalogue.PROJECTS) == 6
    assert catalogue.spoken_for(configuration.tenants.sources) == (VIRTUAL_CLUSTER,)


def test_each_choice_is_shown_with_what_it_means() -> None:
    shown = configfile.describe(BrainConfiguration)
    for title in ("directory", *catalogue.PROJECTS):
        assert f"# - {title}: {{" in shown
    assert configfile.parse(shown, BrainConfiguration, source="default") == BrainConfiguration()
