"""Taking over from a kube-proxy while traffic goes on: vcproxy's table first, then the old rules go.

While both are there, whichever nat chain was registered first translates a new connection, and the other leaves a
translated one alone; both lead to the same endpoints. The old rules go in one transaction once the table of the super
cluster is complete, and what they translated stays conntrack's. A kube-proxy that still runs would put its rules back:
it is named, and waited for.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from vcproxy.kubeproxy import leftovers
from vcproxy.kubeproxy.leftovers import LeftoverError, Leftovers, Process
from vcproxy.ops import logs

POLL_SECONDS = 1.0
AGAIN_SECONDS = 30.0

log = logs.get("takeover")


class Rivals(NamedTuple):
    """How kube-proxys and what they left are found, and the latter removed; replaced by tests."""

    running: Callable[[], Iterable[Process]] = leftovers.processes
    find: Callable[[], Leftovers] = leftovers.find
    remove: Callable[[Leftovers], None] = leftovers.remove


def warn(found: Leftovers, *, taking_over: bool) -> None:
    """Name what there is, each with the cure."""
    for process in found.processes:
        log.warning(
            "a kube-proxy runs on this node and goes on programming it: stop it, its DaemonSet's pod or the process",
            pid=process.pid,
            command=process.command,
        )
    cure = "it is removed once vcproxy's own table is complete" if taking_over else "--take-over removes it"
    for rule in found.rules:
        log.warning("kube-proxy left something that translates Services, too", found=rule, cure=cure)
    for reason in found.unknown:
        log.warning("cannot tell whether kube-proxy left something", why=reason)


async def take_over(
    complete: Callable[[], bool], not_served: Callable[[], Collection[str]], rivals: Rivals | None = None
) -> None:
    """Remove what kube-proxy left as soon as `complete` and no kube-proxy runs; what stays is tried again.

    A kube-proxy in a container of its own is not seen from another; but it has the node's network, and so the addresses
    that would be ours: `not_served` tells which ones somebody else has.
    """
    rivals = rivals or Rivals()
    awaited: frozenset[int | str] = frozenset()
    while True:
        pause = POLL_SECONDS
        if complete():
            # Processes first: they are cheap to look for, and rules may be very many.
            running: frozenset[int | str] = await asyncio.to_thread(
                lambda: frozenset(process.pid for process in rivals.running())
            )
            running |= frozenset(not_served())
            for it in running - awaited:
                told = {"pid": it} if isinstance(it, int) else {"it_listens_on": it}
                log.warning("waiting for kube-proxy to end before its rules are removed: stop it", **told)
            awaited = running
            if not running:
                try:
                    found = await asyncio.to_thread(rivals.find)
                    await asyncio.to_thread(rivals.remove, found)
                    log.info("took over from kube-proxy", removed=found.rules)
                    return
                except LeftoverError as error:
                    pause = AGAIN_SECONDS
                    log.error("not all of kube-proxy is gone; trying again", error=str(error), again_in=pause)
        await asyncio.sleep(pause)
