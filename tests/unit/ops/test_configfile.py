"""Configuration: defaults that load, errors that name file, line and field."""

from typing import Any

import pytest

from vcproxy.brain.config import BrainConfiguration
from vcproxy.node.config import NodeConfiguration
from vcproxy.ops import configfile
from vcproxy.ops.configfile import ConfigError

HEADER = "apiVersion: vcproxy.dev/v1alpha1\nkind: BrainConfiguration\n"


@pytest.mark.parametrize("kind", [BrainConfiguration, NodeConfiguration])
def test_the_default_file_is_the_default(kind: Any) -> None:
    assert configfile.parse(configfile.describe(kind), kind, source="default") == kind()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("listen: {adress: x}", "f.yaml:3: listen.adress: Object contains unknown field `adress`"),
        (
            "tenants:\n  sources:\n  - directory: {path: 3}",
            "f.yaml:5: tenants.sources[0].directory.path: Expected `str`",
        ),
        ("foo: 1", "f.yaml:3: foo: Object contains unknown field `foo`"),
        ("logLevel: loud", "f.yaml:3: logLevel: Expected `str` matching"),
        (
            "tenants:\n  policy:\n    limits:\n      services: many",
            "f.yaml:6: tenants.policy.limits.services: Expected `int`",
        ),
        ("listen: [", "f.yaml:3: not YAML"),
    ],
)
def test_bad_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configfile.parse(HEADER + text, BrainConfiguration, source="f.yaml")
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1: expected a mapping"),
        ("- a", "f.yaml:1: expected a mapping"),
        ("kind: BrainConfiguration", "f.yaml:1: apiVersion: expected vcproxy.dev/v1alpha1"),
        ("apiVersion: vcproxy.dev/v1alpha1\nkind: Brain", "f.yaml:2: kind: expected BrainConfiguration"),
    ],
)
def test_not_this_kind(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configfile.parse(text, BrainConfiguration, source="f.yaml")
    assert str(raised.value).startswith(message)


def test_missing_file_is_named(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        configfile.load(tmp_path / "absent.yaml", BrainConfiguration)


def test_null_super_cluster_means_none() -> None:
    assert configfile.parse(HEADER + "superCluster: null", BrainConfiguration, source="f").super_cluster is None
