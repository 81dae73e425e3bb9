"""Leaving no trace: the table goes, and with it the flows of the zones that it had given out.

Flows of zone 0 stay: they are everybody's.
"""

from vcproxy_nftables import chains, table
from vcproxy_nftables.kernel import Kernel, run_nft
from vcproxy_nftables.netlink import NetlinkError
from vcproxy_nftables.specs import ORDER, TENANTS


def clean() -> None:
    """Remove all that the backend ever put into this network namespace. Raises BackendError."""
    kernel = Kernel()
    try:
        if not kernel.netlink.exists():
            return
        try:
            keys = kernel.netlink.dump(TENANTS).keys
            zones = [int.from_bytes(row.tobytes(), ORDER) for row in keys]
        except (NetlinkError, ValueError):  # not a table of ours but for the name, or one cut down by hand
            zones = []
        run_nft("-f", "-", text=f"delete table inet {table.TABLE}\n{chains.without_reference()}")
        for zone in zones:
            kernel.conntrack.flush_zone(zone)
    finally:
        kernel.close()
