"""Finding backends by name: entry points of the group `vcproxy.backends`."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any, cast

from vcproxy.backend.protocol import Backend, BackendUnavailable

GROUP = "vcproxy.backends"


def names() -> list[str]:
    """Names of the installed backends, sorted."""
    return sorted(metadata.entry_points(group=GROUP).names)


def create(name: str, options: Mapping[str, Any]) -> Backend:
    """A backend, not yet opened. Raises BackendUnavailable for an unknown name, ValueError for bad options."""
    found = metadata.entry_points(group=GROUP, name=name)
    if not found:
        raise BackendUnavailable(f"there is no backend {name!r}; installed: {', '.join(names()) or 'none'}")
    (entry,) = found
    return cast(Backend, entry.load()(options))
