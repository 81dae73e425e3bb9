"""kube-proxy's metrics: its names, labels and types, about what a kube-proxy on this node would have to do.

That is the super cluster. A dashboard or an alert for kube-proxy is about the cluster that owns the nodes, and a tenant
must not be able to move it: a tenant writes the trigger times that network programming is reckoned from, and may have
any number of Services that drop. What tenants cost and how they fare is told by the metrics with prefix vcproxy_.

kube-proxy runs a proxier for each IP family, with transactions of its own; here one transaction programs both. So what
is about transactions is told for both families alike, and what is about endpoints for the families that they have.
"""

import functools
import platform
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import metadata
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram

from vcproxy.backend.protocol import Reconciled
from vcproxy.node.holdings import Extent
from vcproxy.node.localpolicy import FAMILY_NAMES, POLICIES, Unserved
from vcproxy.ops.metrics import REGISTRY

KUBERNETES = "1.37.2"
"""The release whose kube-proxy this program stands for."""

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

_DOUBLING = tuple(0.001 * 2**step for step in range(15))
# The first bound is no use to anybody, but kube-proxy has it: MergeBuckets of component-base begins with a zero.
_LATENCY = (0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))


def _histogram(name: str, meaning: str, buckets: Sequence[float] = _DOUBLING) -> Histogram:
    return Histogram(f"kubeproxy_{name}", meaning, ["ip_family"], buckets=buckets, registry=REGISTRY)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(f"kubeproxy_{name}", meaning, labels, registry=REGISTRY)


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    """The library appends `_total` to the name."""
    return Counter(f"kubeproxy_{name}", meaning, labels, registry=REGISTRY)


HEALTHZ = _counter("proxy_healthz", "Answers of /healthz by HTTP status", "code")
LIVEZ = _counter("proxy_livez", "Answers of /livez by HTTP status", "code")

SYNC = _histogram("sync_proxy_rules_duration_seconds", "One sync of the super cluster's Services")
FULL_SYNC = _histogram("sync_full_proxy_rules_duration_seconds", "The same, of all of them")
PARTIAL_SYNC = _histogram("sync_partial_proxy_rules_duration_seconds", "The same, of those that changed")
LAST_SYNC = _gauge("sync_proxy_rules_last_timestamp_seconds", "Unix time of the last good sync", "ip_family")
LAST_QUEUED = _gauge("sync_proxy_rules_last_queued_timestamp_seconds", "Unix time a sync was last due", "ip_family")
NETWORK_PROGRAMMING = _histogram(
    "network_programming_duration_seconds",
    "From the change of an endpoint, by the API server's clock, to the kernel",
    _LATENCY,
)

SERVICES_SEEN = _counter("sync_proxy_rules_service_changes", "Changes of Services seen")
SERVICES_PENDING = _gauge("sync_proxy_rules_service_changes_pending", "Changes of Services not yet synced")
ENDPOINTS_SEEN = _counter("sync_proxy_rules_endpoint_changes", "Changes of Services' endpoints seen")
ENDPOINTS_PENDING = _gauge("sync_proxy_rules_endpoint_changes_pending", "Changes of Services' endpoints not yet synced")

# A gauge, in spite of its name.
NO_LOCAL_ENDPOINTS = _gauge(
    "sync_proxy_rules_no_local_endpoints_total",
    "Service ports with a Local traffic policy that drop: they have endpoints on other nodes only",
    "traffic_policy",
    "ip_family",
)
SYNC_FAILURES = _counter("sync_proxy_rules_nftables_sync_failures", "Syncs that failed", "ip_family")
CLEANUP_FAILURES = _counter(
    "sync_proxy_rules_nftables_cleanup_failures", "Times that what nobody wants could not be removed", "ip_family"
)

CONNTRACK = _histogram("conntrack_reconciler_sync_duration_seconds", "One look for stale UDP flows")
CONNTRACK_DELETED = _counter("conntrack_reconciler_deleted_entries", "Stale UDP flows deleted", "ip_family")

BUILD = Gauge(
    "kubernetes_build_info",
    "The Kubernetes release whose kube-proxy this stands for, and what it is",
    [
        "major",
        "minor",
        "git_version",
        "git_commit",
        "git_tree_state",
        "build_date",
        "go_version",
        "compiler",
        "platform",
    ],
    registry=REGISTRY,
)


@functools.cache
def _families(metric: Metric) -> tuple[Metric, ...]:
    """A metric's series of both families, which the library would look up, under a lock, at each commit."""
    return tuple(metric.labels(family) for family in FAMILY_NAMES.values())


def begin() -> None:
    """This process is a proxy: show what kube-proxy shows before it has done anything."""
    major, minor, _ = KUBERNETES.split(".")
    # A distribution of Kubernetes names itself so (v1.33.1+k3s1): whoever compares releases sees the one meant.
    BUILD.labels(
        major=major,
        minor=minor,
        git_version=f"v{KUBERNETES}+vcproxy.{metadata.version('vcproxy')}",
        git_commit="",
        git_tree_state="",
        build_date="",
        go_version="",
        compiler=platform.python_implementation().lower(),
        platform=f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine()) }",
    ).set(1)
    queued()


def queued() -> None:
    """A sync is due."""
    for gauge in _families(LAST_QUEUED):
        gauge.set_to_current_time()


def seen(change: Extent) -> None:
    """A change arrived."""
    SERVICES_SEEN.inc(change.services)
    SERVICES_PENDING.inc(change.services)
    ENDPOINTS_SEEN.inc(change.endpoints)
    ENDPOINTS_PENDING.inc(change.endpoints)


def tried(seconds: float, *, full: bool) -> None:
    """A sync took so long, whatever came of it: nothing is pending but what arrived meanwhile or is tried again."""
    for histogram in (*_families(SYNC), *_families(FULL_SYNC if full else PARTIAL_SYNC)):
        histogram.observe(seconds)


def took_up() -> None:
    """A sync begins, with all that is pending."""
    SERVICES_PENDING.set(0)
    ENDPOINTS_PENDING.set(0)


def synced() -> None:
    """All that was due is programmed."""
    for gauge in _families(LAST_SYNC):
        gauge.set_to_current_time()


def programmed(families: Iterable[str], event_ns: int) -> None:
    """A change that happened at that Unix time, in nanoseconds, is programmed."""
    for family in families:
        NETWORK_PROGRAMMING.labels(family).observe(max(time.time() - event_ns / 1e9, 0))


def reconciled(looks: Collection[Reconciled]) -> None:
    """Stale flows were looked for."""
    for look in looks:
        CONNTRACK.labels(FAMILY_NAMES[look.family]).observe(look.seconds)
        CONNTRACK_DELETED.labels(FAMILY_NAMES[look.family]).inc(look.flows)


def unserved(counts: Mapping[Unserved, int]) -> None:
    """So many service ports drop."""
    for policy in POLICIES:
        for family in FAMILY_NAMES.values():
            NO_LOCAL_ENDPOINTS.labels(policy, family).set(counts.get(Unserved(policy, family), 0))


def sync_failed() -> None:
    """A sync failed."""
    for counter in _families(SYNC_FAILURES):
        counter.inc()


def cleanup_failed() -> None:
    """What is nobody's could not be removed."""
    for counter in _families(CLEANUP_FAILURES):
        counter.inc()
