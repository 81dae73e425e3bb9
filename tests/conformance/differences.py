"""Where vcproxy differs from kube-proxy on purpose. Whatever else differs is a fault, and fails.

A difference says which cases it is about and what happens there instead; the columns hold vcproxy to that as strictly as
to kube-proxy's behaviour elsewhere. `docs/kube-proxy-differences.md` is made of this list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.conformance.model import CONFIGURATIONS, FLAT, KUBE_PROXY, PODS, Case, Expectation


@dataclass(frozen=True)
class Difference:
    """`applies`: to a case in one of `columns`; `instead`: what happens in place of what the case expects."""

    name: str
    kube_proxy: str
    vcproxy: str
    reason: str
    columns: tuple[str, ...]
    applies: Callable[[Case], bool]
    instead: Callable[[Case], Expectation]


def _short_circuit_without_detector(case: Case) -> bool:
    """A pod on this node dials a public address of a Service whose external policy is Local, and nobody said which
    addresses are pods'.
    """
    step = case.scenario.steps[case.step]
    local = {one.name for one in step.services if one.spec.get("externalTrafficPolicy") == "Local"}
    public = all(target.kind in ("NodePort", "ExternalIP", "LoadBalancer") for target in case.flow.targets)
    here = PODS.get(case.flow.client) == "here"
    known = CONFIGURATIONS[case.configuration].detector
    return here and public and not known and all(target.service in local for target in case.flow.targets)


DIFFERENCES = (
    Difference(
        name="A tenant's pods are known without a detector",
        kube_proxy="Without a detector of local traffic (no `--cluster-cidr`) no client is known to be a pod, so pods "
        "that dial a node port, external or load-balancer IP of a Service with `externalTrafficPolicy: Local` get its "
        "local endpoints only.",
        vcproxy="A tenant's pods on this node are short-circuited to all endpoints all the same.",
        reason="Their attachment says that they are the tenant's pods. The detector is about the super cluster's.",
        columns=(FLAT,),
        applies=_short_circuit_without_detector,
        instead=lambda case: case.flow.expected("base"),
    ),
)


def difference(case: Case, column: str) -> Difference | None:
    """The difference that a case shows in a column of vcproxy's."""
    if column == KUBE_PROXY:
        return None
    return next((one for one in DIFFERENCES if column in one.columns and one.applies(case)), None)


def expected(case: Case, column: str) -> Expectation:
    """What must happen to a case in a column."""
    found = difference(case, column)
    return found.instead(case) if found else case.expect
