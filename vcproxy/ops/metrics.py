"""Metrics: one registry a process, and the HTTP server that shows it.

What is here has the prefix `vcproxy_`; kube-proxy's own metrics are the node's (node.proxymetrics). A label holds a
tenant's uid, which the operator's side made, never a string that a tenant wrote: the number of series stays bounded.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

import prometheus_client
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# A second series for each counter and histogram that says when it was made: nobody reads it, and kube-proxy has none.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY = CollectorRegistry(auto_describe=True)
prometheus_client.ProcessCollector(registry=REGISTRY)
prometheus_client.PlatformCollector(registry=REGISTRY)


class Tally(Collector):
    """A counter with one label, for hot paths of one thread: adding to it costs 0.1 us, to a Counter 1.5 us."""

    def __init__(self, name: str, documentation: str, label: str, *, registry: CollectorRegistry) -> None:
        self._of = name, documentation, label
        self._counts: dict[str, int] = {}
        registry.register(self)

    def add(self, value: str, amount: int) -> None:
        """Count so many more for this value of the label."""
        self._counts[value] = self._counts.get(value, 0) + amount

    def collect(self) -> Iterator[CounterMetricFamily]:
        """For prometheus_client, in any thread."""
        name, documentation, label = self._of
        family = CounterMetricFamily(name, documentation, labels=[label])
        for value, count in list(self._counts.items()):
            family.add_metric([value], count)
        yield family


# The same steps as kube-proxy's sync histogram: 1 ms doubling 15 times; preceded by the microseconds that we need.
_SECONDS = tuple(0.0000625 * 2**step for step in range(19))

# Brain.
EVENTS = Counter("vcproxy_events", "Watch events and listed objects read", ["tenant"], registry=REGISTRY)
REFUSED = Counter("vcproxy_refused", "Objects or fields refused, by reason", ["tenant", "reason"], registry=REGISTRY)
TENANTS = Gauge("vcproxy_tenants", "Tenants held", ["state"], registry=REGISTRY)
STALE = Gauge(
    "vcproxy_tenant_stale_since_timestamp_seconds",
    "Unix time since when a tenant's API server cannot be reached; 0 when it can",
    ["tenant"],
    registry=REGISTRY,
)
CREDENTIALS_EXPIRY = Gauge(
    "vcproxy_tenant_credentials_expiry_timestamp_seconds",
    "Unix time at which the credentials in use for a tenant's API server end; 0 for those without an end",
    ["tenant"],
    registry=REGISTRY,
)
RELISTED = Counter(
    "vcproxy_lists_for_nodes_ahead",
    "Times all was listed because a node had newer content than this brain",
    ["tenant"],
    registry=REGISTRY,
)
SHARDS = Gauge(
    "vcproxy_shards", "Shards of tenants; held: fed by this brain, kept: followed by it", ["state"], registry=REGISTRY
)
SHARD_MOVES = Counter(
    "vcproxy_shard_moves", "Shards that this brain took, and ended to feed", ["move"], registry=REGISTRY
)
NODES = Gauge("vcproxy_nodes_connected", "Node agents connected", registry=REGISTRY)
SENT_BYTES = Tally("vcproxy_sent_bytes", "Bytes sent to nodes", "message", registry=REGISTRY)
COMPILE = Histogram("vcproxy_compile_seconds", "From watch event to new revision", buckets=_SECONDS, registry=REGISTRY)

# Node.
COMMIT = Histogram(
    "vcproxy_commit_seconds", "From change received to kernel committed", buckets=_SECONDS, registry=REGISTRY
)
PROPAGATION = Histogram(
    "vcproxy_propagation_seconds", "From read by the brain to kernel committed", buckets=_SECONDS, registry=REGISTRY
)
COMMITTED = Counter("vcproxy_committed", "Tenant revisions committed", ["tenant"], registry=REGISTRY)
RECEIVED = Counter("vcproxy_received", "Tenant contents received from a brain", ["message"], registry=REGISTRY)
OPERATIONS = Counter("vcproxy_kernel_operations", "Kernel elements added and removed", registry=REGISTRY)
REJECTED = Gauge("vcproxy_rejected_ports", "Service ports in quarantine", ["tenant"], registry=REGISTRY)
FAILURES = Counter(
    "vcproxy_commit_failures", "Updates that could not be committed and are retried", ["tenant"], registry=REGISTRY
)
REPAIRS = Counter("vcproxy_repairs", "Times that foreign changes to the table were mended", registry=REGISTRY)
CACHE_FAILURES = Counter("vcproxy_cache_failures", "Times the last good state could not be written", registry=REGISTRY)
CONNECTED = Gauge("vcproxy_brain_connected", "1 while the stream from a brain is up", registry=REGISTRY)
FEEDERS = Gauge("vcproxy_content_streams", "Streams up from brains that share tenants", registry=REGISTRY)
BEHIND = Gauge(
    "vcproxy_tenants_brain_behind",
    "Tenants, and the node itself, of which the brain may know less than this node",
    registry=REGISTRY,
)


def value(name: str, labels: Mapping[str, str] | None = None) -> float:
    """What a series stands at; 0 if it has never been touched."""
    return REGISTRY.get_sample_value(name, dict(labels or {})) or 0.0


@contextlib.asynccontextmanager
async def serve(address: str, handlers: Mapping[str, Handler]) -> AsyncIterator[str]:
    """Serve GET handlers by path on `host:port` while the context is open; yields the address bound.

    An empty address serves nothing and yields "". Raises OSError when the address cannot be bound.
    """
    if not address:
        yield ""
        return
    host, _, port = address.rpartition(":")
    app = web.Application()
    for path, handler in handlers.items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host.strip("[]") or None, int(port))
        await site.start()
        bound = runner.addresses[0]
        yield f"{bound[0]}:{bound[1]}"
    finally:
        await runner.cleanup()


async def show(_: web.Request) -> web.Response:
    """The handler of /metrics. Rendering takes a while with many series, so it runs in a thread."""
    body = await asyncio.to_thread(prometheus_client.generate_latest, REGISTRY)
    return web.Response(body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})
