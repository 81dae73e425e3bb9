"""What the brain shows of itself: the data behind `status`, `get` and `explain`. Plain data from memory, no I/O."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from vcproxy.brain.compiler import virtual_addresses
from vcproxy.brain.feed import Feed
from vcproxy.brain.guard import CURES
from vcproxy.brain.inputs import ApiInput
from vcproxy.brain.placement import Placement
from vcproxy.brain.progress import NodeStatus
from vcproxy.brain.sources import Problem
from vcproxy.brain.store import Store, Stored
from vcproxy.model.addresses import format_address
from vcproxy.model.tenant import TenantModel
from vcproxy.ops import views
from vcproxy.ops.admin import Provider

Query = Mapping[str, str]
MOST_EXPLAINED = 1000
"""Refused endpoints that `explain` names one by one."""


class View(msgspec.Struct, frozen=True):
    """Where the answers come from. The callables give what is so at the moment they are called."""

    store: Store
    placement: Placement
    feeds: Callable[[], Mapping[str, Feed]]
    nodes: Callable[[], Sequence[NodeStatus]]
    problems: Callable[[], Iterable[Problem]]
    sharding: Callable[[], Mapping[str, Any]] | None = None


def routes(view: View) -> Mapping[str, Provider]:
    """The admin socket's routes. `?tenant=` takes a uid or a name; an unknown one raises KeyError."""
    return {
        "/status": lambda _: status(view),
        "/tenants": lambda query: tenant_rows(view, query.get("tenant")),
        "/services": lambda query: _rows(view, query, views.service_rows),
        "/frontends": lambda query: _rows(view, query, views.frontend_rows),
        "/endpoints": lambda query: _rows(view, query, _endpoints(view)),
        "/nodes": lambda _: node_rows(view),
        "/refusals": lambda query: refusal_rows(view, query),
        "/explain": lambda query: explain(view, query),
    }


def status(view: View) -> dict[str, Any]:
    """What `status` shows. `healthy`: every tenant synced and well, nothing refused by a node, no problem anywhere."""
    tenants, nodes = tenant_rows(view, None), node_rows(view)
    problems = [{"problem": f"{found.subject}: {found.message}"} for found in view.problems()]
    troubled = any(not row["synced"] or row["staleSince"] or row["degraded"] for row in tenants)
    return {
        "role": "brain",
        "brain": view.store.brain_id,
        "healthy": view.placement.ready and not (troubled or problems or any(row["rejections"] for row in nodes)),
        "ready": view.placement.ready,
        "problems": problems,
        "sharding": view.sharding() if view.sharding is not None else None,
        "tenants": tenants,
        "nodes": nodes,
    }


def tenant_rows(view: View, tenant: str | None) -> list[dict[str, Any]]:
    """One row a tenant. `refused`: how many objects have something refused; times are Unix seconds.

    `heardAt`: how new all is that is known of its Services and slices; None for tenants without an API server.
    """
    feeds = view.feeds()
    return [_tenant_row(uid, stored, feeds.get(uid)) for uid, stored in _asked(view, tenant)]


def _tenant_row(uid: str, stored: Stored, feed: Feed | None) -> dict[str, Any]:
    compiler = feed.compiler if feed is not None else None
    return {
        "uid": uid,
        "name": stored.tenant.name,
        "revision": stored.revision,
        "digest": stored.model.digest.hex(),
        "synced": stored.synced,
        "restored": stored.restored,
        "ports": len(stored.model),
        "endpoints": sum(map(views.count, stored.model)),
        "virtualRanges": [str(prefix) for prefix in stored.tenant.virtual_ranges],
        "refused": sum(1 for _ in compiler.refusals()) if compiler is not None else 0,
        "degraded": compiler.degraded if compiler is not None else False,
        "stale": stored.stale_since is not None,
        "staleSince": stored.stale_since,
        "staleReason": stored.stale_reason,
        "updatedAt": stored.updated_at or None,
        "heardAt": feed.source.heard if feed is not None and isinstance(feed.source, ApiInput) else None,
        "restarts": feed.restarts if feed is not None else 0,
    }


def node_rows(view: View) -> list[dict[str, Any]]:
    """One row a stream of a node. `behind`: tenants whose newest content it has not committed."""
    return [
        {
            "node": found.node,
            "connected": round(time.time() - found.connected_since, 3),
            "connectedSince": found.connected_since,
            "peer": found.peer,
            "stream": found.stream,
            "agent": found.agent,
            "tenants": len(found.tenants),
            "behind": [tenant.uid for tenant in found.tenants if not tenant.current],
            "rejections": sum(len(tenant.rejections) for tenant in found.tenants),
            "byTenant": {tenant.uid: _progress(tenant) for tenant in found.tenants},
        }
        for found in view.nodes()
    ]


def _progress(tenant: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.structs.asdict(tenant)
    plain["rejections"] = {str(said.key): said.reason for said in tenant.rejections}
    return plain


def refusal_rows(view: View, query: Query) -> list[dict[str, Any]]:
    """What the guard refused and what could not be read; `namespace` and `service` narrow it to one Service."""
    feeds = view.feeds()
    rows: list[dict[str, Any]] = []
    for uid, _ in _asked(view, query.get("tenant")):
        if uid not in feeds:
            continue
        compiler = feeds[uid].compiler
        if "service" in query:
            found: Iterable[Any] = compiler.explain(query.get("namespace", "default"), query["service"])
        else:
            found = compiler.refusals()
        rows.extend({"tenant": uid, **msgspec.structs.asdict(record)} for record in found)
    return rows


def explain(view: View, query: Query) -> dict[str, Any]:
    """All that is known of one Service: `tenant` (uid or name), `namespace`, `service`. Raises KeyError.

    `virtual`: its virtual addresses, and who said so. `refused` has each kind of refusal once, `refusedEndpoints` each
    endpoint address, at most MOST_EXPLAINED. `rejections`: what nodes do not program of it, and why.
    """
    for field in ("tenant", "service"):
        if field not in query:
            raise KeyError(f"{field} is missing: ask /explain?tenant=T&namespace=N&service=S")
    (uid, stored), *_ = _asked(view, query["tenant"])
    namespace, name = query.get("namespace", "default"), query["service"]
    feed = view.feeds().get(uid)
    compiler = feed.compiler if feed is not None else None
    ports = [port for port in stored.model if (port.key.namespace, port.key.service) == (namespace, name)]
    given = frozenset(compiler.given(namespace, name)) if compiler is not None else frozenset[bytes]()
    denied = compiler.denied(namespace, name) if compiler is not None else iter(())
    model = TenantModel(ports)
    return {
        "tenant": uid,
        "name": stored.tenant.name,
        "namespace": namespace,
        "service": name,
        "synced": stored.synced,
        "staleSince": stored.stale_since,
        "staleReason": stored.stale_reason,
        "degraded": compiler.degraded if compiler is not None else False,
        "virtual": [
            {"address": format_address(address), "by": "the super cluster" if address in given else "the Service"}
            for address in sorted(virtual_addresses(ports))
        ],
        "ports": views.service_rows(uid, model),
        "endpoints": views.endpoint_rows(uid, model, view.placement.node_names()),
        "refused": refusal_rows(view, {"tenant": uid, "namespace": namespace, "service": name}),
        "refusedEndpoints": [
            {"slice": held, "address": format_address(address), "reason": reason, "cure": CURES[reason]}
            for held, address, reason in itertools.islice(denied, MOST_EXPLAINED)
        ],
        "rejections": [
            {"node": found.node, "port": str(said.key), "reason": said.reason}
            for found in view.nodes()
            for tenant in found.tenants
            if tenant.uid == uid
            for said in tenant.rejections
            if (said.key.namespace, said.key.service) == (namespace, name)
        ],
    }


def _endpoints(view: View) -> Callable[[str, TenantModel], list[views.Row]]:
    names = view.placement.node_names
    return lambda uid, model: views.endpoint_rows(uid, model, names())


def _rows(view: View, query: Query, rows: Callable[[str, TenantModel], list[views.Row]]) -> list[views.Row]:
    return [row for uid, stored in _asked(view, query.get("tenant")) for row in rows(uid, stored.model)]


def _asked(view: View, tenant: str | None) -> list[tuple[str, Stored]]:
    found = [
        (uid, stored)
        for uid, stored in sorted(view.store.tenants().items())
        if tenant in (None, uid, stored.tenant.name)
    ]
    if tenant is not None and not found:
        raise KeyError(f"tenant {tenant!r} is not known to this brain")
    return found
