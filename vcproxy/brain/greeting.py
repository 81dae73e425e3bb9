"""How a node's stream begins, and what is to be said on it."""

import enum
from collections.abc import Mapping
from typing import NamedTuple

from vcproxy.model.mark import UNMARKED, Mark
from vcproxy.pb import features


class Kind(enum.Enum):
    """What is said on a stream: everything; only what tenants' contents are; all but that."""

    WHOLE = "whole"
    CONTENT = "content"
    LEADING = "leading"


class Greeting(NamedTuple):
    """A Hello, checked: `known` is what the node holds, tenant uid -> digest, and `marks` how new that is.

    `unheard`: kinds of which it said what cannot be believed. `mark`: how new that is what it was told of itself.
    """

    node: str
    agent: str
    known: Mapping[str, bytes]
    marks: Mapping[str, Mark] = {}
    unheard: Mapping[str, frozenset[str]] = {}
    features: frozenset[str] = frozenset()
    mark: Mark = UNMARKED

    def kind(self, *, sharded: bool) -> Kind:
        """Of the stream that begins so; `sharded`: the brain has a part of the tenants."""
        if features.CONTENT in self.features:
            return Kind.CONTENT
        return Kind.LEADING if sharded and features.SHARDS in self.features else Kind.WHOLE
