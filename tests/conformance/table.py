"""The whole table: every scenario, every case, and the numbers that their objects have."""

from __future__ import annotations

from tests.conformance import (
    cases_affinity,
    cases_basic,
    cases_changes,
    cases_external,
    cases_policies,
    cases_selection,
    cases_topology,
)
from tests.conformance.model import Case, Scenario, cases_of
from tests.conformance.objects import Plan

SCENARIOS: list[Scenario] = [
    *cases_basic.SCENARIOS,
    *cases_external.SCENARIOS,
    *cases_policies.SCENARIOS,
    *cases_topology.SCENARIOS,
    *cases_affinity.SCENARIOS,
    *cases_selection.SCENARIOS,
    *cases_changes.SCENARIOS,
]
PLAN = Plan(SCENARIOS)
CASES: list[Case] = [case for scenario in SCENARIOS for case in cases_of(scenario)]
