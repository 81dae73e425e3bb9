"""The whole table: every scenario, every case, and the numbers that their objects have."""

from __future__ import annotations

from tests.conformance import cases_basic
from tests.conformance.model import Case, Scenario, cases_of
from tests.conformance.objects import Plan

SCENARIOS: list[Scenario] = [*cases_basic.SCENARIOS]
PLAN = Plan(SCENARIOS)
CASES: list[Case] = [case for scenario in SCENARIOS for case in cases_of(scenario)]
