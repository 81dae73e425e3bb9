"""`make conformance`: run the table in all columns, show it, and write the documents about it."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from e2e.conformance.columns import Run, perform
from e2e.controlplane import ControlPlane, find_binaries
from tests.conformance import report
from tests.conformance.differences import difference, expected
from tests.conformance.interpreter import interpret
from tests.conformance.model import COLUMNS, CONFIGURATIONS, INTERPRETER, Case
from tests.conformance.objects import lab_cast
from tests.conformance.table import CASES, PLAN


@dataclass(frozen=True)
class Result:
    """A case in a column. `difference`: the name of the deliberate one that it shows, "" for none."""

    column: str
    case: str
    scenario: tuple[str, str]
    want: str
    found: str
    difference: str = ""

    @property
    def right(self) -> bool:
        return self.want == self.found


def _interpreted(cases: Sequence[Case]) -> list[Result]:
    made = ((case, interpret(PLAN, lab_cast(), CONFIGURATIONS[case.configuration], case)) for case in cases)
    return [_result(INTERPRETER, case, str(outcome)) for case, outcome in made]


def _result(column: str, case: Case, found: str) -> Result:
    shown = difference(case, column)
    return Result(
        column,
        case.id,
        (case.scenario.family, case.scenario.name),
        str(expected(case, column)),
        found,
        shown.name if shown else "",
    )


def _performed(
    column: str, configuration: str, cases: Sequence[Case], place: Path, plane: ControlPlane
) -> list[Result]:
    observed = perform(Run(column, CONFIGURATIONS[configuration], PLAN, cases), place, plane)
    results = [_result(column, case, str(observed.found[case.id])) for case in cases]
    for case in cases:
        if case.id in observed.opposites:
            found, want = observed.opposites[case.id]
            place_of = (case.scenario.family, case.scenario.name)
            results.append(Result(column, f"{case.id}, the second tenant", place_of, str(want), str(found)))
    return results


def run(columns: Sequence[str], words: str, tell: Callable[[str], None]) -> list[Result]:
    """Every case whose name has these words, in these columns."""
    results: list[Result] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vcp-conf-")))
        plane = None
        for column in columns:
            chosen = [case for case in CASES if case.in_column(column) and words in case.id]
            if column == INTERPRETER:
                results += _interpreted(chosen)
                continue
            if plane is None:
                plane = ControlPlane("super", directory / "plane", bin_dir=find_binaries(build=True))
                stack.callback(plane.close)
                plane.start()
            for number, configuration in enumerate(CONFIGURATIONS):
                cases = [case for case in chosen if case.configuration == configuration]
                if cases:
                    tell(f"{column}, configuration {configuration}: {len(cases)} cases")
                    place = directory / f"{column}-{number}"
                    place.mkdir()
                    results += _performed(column, configuration, cases, place, plane)
    return results


def _drawn(results: Sequence[Result], columns: Sequence[str]) -> Table:
    """Scenario by column: how many cases are right; in yellow where some show a deliberate difference."""
    drawn = Table("family", "scenario", *columns, header_style="bold", box=None)
    for scenario in dict.fromkeys(result.scenario for result in results):
        cells = []
        for column in columns:
            held = [result for result in results if result.scenario == scenario and result.column == column]
            right = sum(result.right for result in held)
            colour = "red" if right < len(held) else "yellow" if any(r.difference for r in held) else "green"
            cells.append(f"[{colour}]{right}/{len(held)}[/]" if held else "[dim]-[/]")
        drawn.add_row(*scenario, *cells)
    return drawn


@click.command()
@click.option("--column", "columns", multiple=True, type=click.Choice(COLUMNS), help="Default: all.")
@click.option("-k", "words", default="", help="Only cases whose name has these words.")
@click.option("-o", "output", type=click.Choice(["table", "json"]), default="table")
def main(columns: tuple[str, ...], words: str, output: str) -> None:
    """Compare vcproxy with kube-proxy, case by case, with real packets."""
    console, errors = Console(), Console(stderr=True)
    asked = columns or COLUMNS
    results = run(asked, words, lambda text: errors.print(text, style="dim"))
    wrong = [result for result in results if not result.right]
    if output == "json":
        print(json.dumps([asdict(result) | {"right": result.right} for result in results], indent=1))
    else:
        console.print(_drawn(results, asked))
        for result in wrong:
            console.print(f"[red]{result.column}[/] {result.case}: want {result.want}, found {result.found}", soft_wrap=True, highlight=False)  # fmt: skip
        different = sum(bool(result.difference) for result in results)
        console.print(f"{len(results)} in all, {len(wrong)} wrong, {different} deliberately different (yellow)")
    report.write()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
