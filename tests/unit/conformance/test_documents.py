"""The documents list exactly the cases and differences that exist, and every difference exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance import report
from tests.conformance.differences import BEYOND, DIFFERENCES, Beyond, Difference, difference
from tests.conformance.table import CASES


def test_the_document_of_cases_is_up_to_date() -> None:
    assert report.CONFORMANCE.read_text() == report.conformance(), "run: make conformance-docs"


def test_the_document_of_differences_is_up_to_date() -> None:
    assert report.DIFFER.read_text() == report.differences(), "run: make conformance-docs"


def test_cases_have_names_of_their_own() -> None:
    names = [case.id for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("one", DIFFERENCES, ids=lambda one: one.name)
def test_a_difference_is_one(one: Difference) -> None:
    shown = [
        case for case in CASES for column in one.columns if case.in_column(column) and difference(case, column) is one
    ]
    assert shown, "no case shows it: remove it"
    assert all(one.instead(case) != case.expect for case in shown), "it is none"


@pytest.mark.parametrize("one", BEYOND, ids=lambda one: one.name)
def test_a_difference_beyond_packets_names_its_test(one: Beyond) -> None:
    file, _, name = one.seen.partition("::")
    assert (f"def {name}(" if name else "def test_") in Path(file).read_text()
