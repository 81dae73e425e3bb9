"""The conformance table through our pure stages and an interpreter: every case in milliseconds, without a kernel."""

from __future__ import annotations

import pytest

from tests.conformance.differences import expected
from tests.conformance.interpreter import interpret
from tests.conformance.model import CONFIGURATIONS, INTERPRETER, Case
from tests.conformance.objects import lab_cast
from tests.conformance.table import CASES, PLAN


@pytest.mark.parametrize("case", [case for case in CASES if case.in_column(INTERPRETER)], ids=lambda case: case.id)
def test_case(case: Case) -> None:
    assert str(interpret(PLAN, lab_cast(), CONFIGURATIONS[case.configuration], case)) == str(
        expected(case, INTERPRETER)
    )
