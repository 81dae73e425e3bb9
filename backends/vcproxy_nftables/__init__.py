"""vcproxy's nftables backend: forwarding tables as elements of a constant-size ruleset.

`backend` is the entry point. Read `table` first: it argues the ruleset.
"""

from vcproxy_nftables.backend import NftablesBackend

__all__ = ["NftablesBackend"]
