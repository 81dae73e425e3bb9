"""What the agent shows of itself: the data behind the health server, `status` and `get tenants`."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from vcproxy.node.agent import Agent
from vcproxy.node.health import TIMEOUT, Health
from vcproxy.node.report import TenantState
from vcproxy.ops import metrics

_COUNTERS: dict[str, tuple[str, dict[str, str]]] = {
    "snapshots": ("vcproxy_received_total", {"message": "snapshot"}),
    "deltas": ("vcproxy_received_total", {"message": "delta"}),
    "operations": ("vcproxy_kernel_operations_total", {}),
    "repairs": ("vcproxy_repairs_total", {}),
}


def health_of(agent: Agent, timeout: float = TIMEOUT, *, awaited: int = 0) -> Health:
    """The agent's health. One that still starts is healthy and not ready.

    `awaited`: of how many tenants brains that share them have yet to tell.

    A node that has not been told whether it is eligible is not, as one whose Node kube-proxy has not seen: it has
    nothing to forward yet.
    """
    progress, facts = agent.progress, agent.facts
    last_success = time.time() - progress.since_success
    eligible = facts is not None and facts.eligible
    if not agent.started:
        return Health({}, last_success, "the last good state to be programmed", eligible)
    behind = [
        uid
        for uid, held in agent.holdings.tenants.items()
        if held.synced and uid not in agent.adopted and progress.tenants.get(uid, TenantState()).revision is None
    ]
    waiting_for = ""
    if not agent.informed:
        waiting_for = "the brain to name this node's tenants"
    elif awaited:
        waiting_for = f"{awaited} tenants to be told by the brains that share them"
    elif behind:
        waiting_for = f"{len(behind)} tenants to be programmed for the first time"
    return Health(progress.late(agent.waiting(), timeout), last_success, waiting_for, eligible)


def is_healthy(agent: Agent, timeout: float = TIMEOUT) -> bool:
    """Whether kube-proxy would call itself healthy: no queued update is late. Costs as much as is waiting."""
    return not agent.started or not agent.progress.late(agent.waiting(), timeout)


def status_of(agent: Agent, problems: Iterable[str] = (), streams: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What `status` shows. `healthy`: all tenants synced and committed, none stale, failing or with rejected ports.

    `problems`: those that are not the agent's. `streams`: from brains that share tenants.
    """
    progress, rows = agent.progress, tenant_rows(agent)
    troubled = any(
        not row["synced"]
        or row["staleSince"]
        or row["behind"]
        or row["rejected"]
        or row["error"]
        or (row["committedRevision"] is None and not row["adopted"])
        for row in rows
    )
    duties = [f"{duty}: {error}" for duty, error in sorted(progress.duty_errors.items())]
    found = [*progress.problems, *duties, *problems]
    return {
        "role": "node",
        "node": agent.node,
        "healthy": agent.started and not troubled and not found,
        "started": agent.started,
        "brain": progress.brain or None,
        "disconnected": progress.disconnect_reason or None,
        "zone": agent.zone or None,
        "eligible": agent.facts is not None and agent.facts.eligible,
        "interfaces": len(agent.attached.interfaces),
        "addresses": len(agent.attached.addresses),
        "problems": [{"problem": problem} for problem in found],
        "brains": list(streams),
        "tenants": rows,
        "counters": {name: int(metrics.value(counter, labels)) for name, (counter, labels) in _COUNTERS.items()},
    }


def tenant_rows(agent: Agent) -> list[dict[str, Any]]:
    """One row a tenant: what `status` and `get tenants` show. Times are Unix seconds."""
    pending = {name for name, _ in agent.waiting()}
    rows = []
    for uid, held in sorted(agent.holdings.tenants.items()):
        state = agent.progress.tenants.get(uid, TenantState())
        rows.append(
            {
                "uid": uid,
                "name": held.tenant.name,
                "revision": held.revision,
                "digest": held.model.digest.hex(),
                "synced": held.synced,
                "ports": len(held.model),
                "adopted": uid in agent.adopted,
                "committedRevision": state.revision,
                "committedDigest": state.digest.hex(),
                "committedAt": state.committed_at or None,
                "microseconds": state.microseconds,
                "pending": uid in pending or state.loading,
                "rejected": len(state.rejected),
                "rejections": {str(key): reason for key, reason in sorted(state.rejected.items())},
                "staleSince": held.stale_since,
                "staleReason": held.stale_reason,
                "behind": held.behind,
                "error": state.error,
            }
        )
    return rows
