"""A KubeProxyConfiguration with where each of its fields was set: a file's line, or a flag.

What is wrong with a configuration, or has no effect, must be told at the place where somebody wrote it. So whatever
judges a configuration names a field by its path, and an Origin says what to call it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path as FilePath
from typing import NamedTuple

from vcproxy.kubeproxy import configuration
from vcproxy.kubeproxy.configuration import KubeProxyConfiguration, Path
from vcproxy.ops.configfile import ConfigError, Document


class Origin:
    """Where fields were set.

    `given`: paths that somebody set to something. `document` and `flags` (path to the flag's name) say where.
    """

    def __init__(
        self, given: Collection[Path], *, document: Document | None = None, flags: Mapping[Path, str] | None = None
    ) -> None:
        self.given = frozenset(given)
        self._document = document
        self._flags = dict(flags or {})

    def joined(self, flags: Mapping[Path, str]) -> "Origin":
        """The same, but that these flags set their fields."""
        given = self.given | flags.keys()
        return Origin(given, document=self._document, flags=self._flags | dict(flags))

    def where(self, path: Path) -> str:
        """What people call the place: `--flag`, `FILE:LINE: field`, or the field's name."""
        names = tuple(step for step in path if isinstance(step, str))
        if names in self._flags:
            return self._flags[names]
        if self._document is not None:
            return self._document.where(path)
        return ".".join(names)


class Warned(NamedTuple):
    """Something that has no effect, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class Read(NamedTuple):
    """A configuration with kube-proxy's defaults, where it was set, and what was passed over in reading."""

    config: KubeProxyConfiguration
    origin: Origin
    warned: tuple[Warned, ...] = ()


def read_file(path: FilePath) -> Read:
    """Read a configuration file. Raises ConfigError that names file, line and field."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    return read_text(text, source=str(path))


def read_text(text: str, *, source: str) -> Read:
    """Like `read_file`."""
    document = Document.read(text, source=source, api_version=configuration.API_VERSION, kind=configuration.KIND)
    kept, unknown = configuration.pruned(document.value)
    document = document._replace(value=kept)
    config = document.shaped(KubeProxyConfiguration, dec_hook=configuration.decode)
    return Read(
        configuration.defaulted(config),
        Origin(
            _set_paths(configuration.plain(config), configuration.plain(KubeProxyConfiguration())), document=document
        ),
        tuple(
            Warned(document.where(path), "is no field of kubeproxy.config.k8s.io/v1alpha1 as of 1.37, and is ignored")
            for path in unknown
        ),
    )


def _set_paths(value: Mapping[str, object], zero: Mapping[str, object], path: Path = ()) -> set[Path]:
    found: set[Path] = set()
    for name, inner in value.items():
        other = zero.get(name)
        if isinstance(inner, Mapping) and isinstance(other, Mapping):
            found |= _set_paths(inner, other, (*path, name))
            if path == () and name == "featureGates" and inner:
                found.add((name,))
        elif inner != other:
            found.add((*path, name))
    return found
