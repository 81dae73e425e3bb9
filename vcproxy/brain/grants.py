"""What each tenant is granted: the configuration's policy, its overrides, and the super cluster's TenantPolicies.

Each layer says only what it changes, and the last one that says something counts: the file's policy for all, the file's
overrides in their order, TenantPolicies in the order of their names. Who a tenant is (uid, name, namespace, labels) is
what its source says of it, which is the operator's side; nothing that the tenant writes selects a policy.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import msgspec
from msgspec import UNSET

from vcproxy.brain import config, guard
from vcproxy.kube.client import Limits as ClientLimits
from vcproxy.kube.reflector import Timing
from vcproxy.model.addresses import Prefix
from vcproxy.ops.configfile import ConfigError


class Identity(Protocol):
    """What selects policies of a tenant; sources.TenantFound has it."""

    @property
    def uid(self) -> str:
        """Its uid."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def namespace(self) -> str:
        """Of the object that is the tenant, "" for none."""

    @property
    def labels(self) -> Mapping[str, str]:
        """Of that object."""

    @property
    def strict(self) -> bool:
        """Whether, unless the policy says otherwise, its endpoints must be its pods."""


class Grant(msgspec.Struct, frozen=True):
    """What a tenant may ask for, and what reading it may cost.

    `stream`: list as the beginning of a watch. `events`: tell it of refusals.
    """

    policy: guard.Policy
    events_per_second: int = 0
    client: ClientLimits = ClientLimits()
    timing: Timing = Timing()
    stream: bool = False
    events: bool = False


class Grants:
    """Who is granted what. `vouches`: the super cluster tells of all pods. Raises ConfigError."""

    def __init__(self, configured: config.Tenants, *, vouches: bool) -> None:
        self._base = configured.policy
        self._overrides = configured.overrides
        self._vouches = vouches
        self._timing = Timing(inactivity=configured.silence_seconds)
        self._stream = configured.watch_list
        self._policies: dict[str, config.Override] = {}
        said = [("tenants.policy", configured.policy)]
        said += [(f"tenants.overrides[{at}].policy", each.policy) for at, each in enumerate(configured.overrides)]
        for where, policy in said:
            if problem := self.problem(policy):
                raise ConfigError(f"{where}.{problem}")

    def problem(self, policy: Any) -> str:
        """Why a policy (or a patch of one) cannot be kept here, beginning with the field; "" if it can."""
        if policy.backends == "sameTenantPods" and not self._vouches:
            return (
                "backends: sameTenantPods needs the super cluster's Pods of all nodes: "
                "set superCluster with pods: true and without node, or backends: any"
            )
        return ""

    def set_policies(self, policies: Mapping[str, config.Override]) -> None:
        """The TenantPolicies of the super cluster are these now, by name."""
        self._policies = dict(policies)

    def of(self, tenant: Identity) -> Grant:
        """What this tenant is granted now."""
        policy = self._base
        for override in (*self._overrides, *(self._policies[name] for name in sorted(self._policies))):
            if matches(override.match, tenant):
                policy = merge(policy, override.policy)
        return self._grant(policy, tenant)

    def _grant(self, policy: config.TenantPolicy, tenant: Identity) -> Grant:
        limits = policy.limits
        node_ports = _ports(policy.node_ports)
        checked = policy.health_check_node_ports
        external = _prefixes(policy.external_ip_ranges)
        balanced = policy.load_balancer_ip_ranges
        own = tenant.strict and self._vouches if policy.backends is None else policy.backends == "sameTenantPods"
        return Grant(
            guard.Policy(
                virtual_ip_ranges=_prefixes(policy.virtual_ip_ranges) or None,
                external_ip_ranges=external,
                load_balancer_ip_ranges=external if balanced is None else _prefixes(balanced),
                node_ports=node_ports,
                health_check_node_ports=node_ports if checked is None else _ports(checked),
                own_pods_only=own,
                egress=_prefixes(policy.egress),
                denied_ranges=_prefixes(policy.denied_ranges),
                deny_nodes=policy.deny_node_addresses,
                deny_other_pods=policy.deny_other_tenants_pods,
                shared_network=policy.pod_network != "own",
                unique_addresses=policy.pod_network == "shared",
                limits=guard.Limits(limits.services, limits.endpoints, limits.endpoints_per_service),
            ),
            events_per_second=limits.events_per_second,
            client=ClientLimits(object_bytes=limits.object_bytes),
            timing=self._timing,
            stream=self._stream,
            events=policy.events,
        )


def matches(match: config.Match, tenant: Identity) -> bool:
    """Whether all that is said is so."""
    return (
        match.name in (None, tenant.name)
        and match.namespace in (None, tenant.namespace)
        and match.uid in (None, tenant.uid)
        and all(tenant.labels.get(key) == value for key, value in match.labels.items())
    )


def merge(policy: config.TenantPolicy, patch: Any) -> config.TenantPolicy:
    """A policy with what a PolicyPatch says."""
    return cast("config.TenantPolicy", _merge(policy, patch))


def _merge(whole: Any, patch: Any) -> Any:
    said = {name: getattr(patch, name) for name in patch.__struct_fields__}
    changes = {
        name: _merge(getattr(whole, name), value) if isinstance(getattr(whole, name), config.Limits) else value
        for name, value in said.items()
        if value is not UNSET
    }
    return msgspec.structs.replace(whole, **changes)


def _prefixes(cidrs: Iterable[config.Cidr]) -> tuple[Prefix, ...]:
    return tuple(cidr.prefix for cidr in cidrs)


def _ports(said: bool | tuple[config.Ports, ...]) -> tuple[guard.PortRange, ...]:
    if isinstance(said, bool):
        return guard.KUBERNETES_PORTS if said else ()
    return tuple(ports.range for ports in said)
