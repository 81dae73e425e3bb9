"""What a list as a stream consists of: every event, in any batches, against what a map of objects would hold."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.apiserver import end_of_list, event
from vcproxy.kube.decode import SERVICES, Page
from vcproxy.kube.errors import ApiError, BadResponse, Gone, ServerError, TooLarge, Unserved
from vcproxy.kube.initial import Initial
from vcproxy.kube.lines import Line, LineCutter
from vcproxy.kube.shapes import Service

END = end_of_list("Service", 70)


def service(name: str, version: int = 1, **spec: object) -> dict[str, Any]:
    return {"metadata": {"namespace": "demo", "name": name, "resourceVersion": str(version)}, "spec": spec}


def initial(*, object_bytes: int = 2_000, list_bytes: int = 1 << 20, list_objects: int = 1_000) -> Initial[Service]:
    return Initial(SERVICES, tenant="acme", object_bytes=object_bytes, list_bytes=list_bytes, list_objects=list_objects)


def listed(*lines: bytes) -> Page[Service]:
    found = initial()
    assert found.take([line.strip() for line in lines]) is None
    assert found.take([END.strip()]) == []
    return found.page


def versions(page: Page[Service]) -> dict[str, str]:
    return {found.metadata.name: found.metadata.resource_version for found in page.objects}


def test_what_follows_the_end_is_handed_back() -> None:
    found = initial()
    change: list[Line] = [event("ADDED", service("c", 71)).strip(), b"not looked at"]
    assert found.take([event("ADDED", service("b", 9)).strip(), event("ADDED", service("a", 3)).strip()]) is None
    assert found.take([END.strip(), *change]) == change
    assert found.page.resource_version == "70" and found.page.errors == () and found.page.next_token == ""
    assert versions(found.page) == {"b": "9", "a": "3"}


def test_nothing_at_all_is_a_list() -> None:
    assert listed() == Page((), (), "70", "")


def test_of_one_object_the_last_counts() -> None:
    page = listed(
        event("ADDED", service("a", 1)), event("ADDED", service("b", 2)), event("ADDED", service("a", 3)),
        event("MODIFIED", service("b", 4)), event("ADDED", service("c", 5)), event("DELETED", service("c", 6)),
        event("DELETED", service("never", 7)), event("DELETED", service("d", 8)), event("ADDED", service("d", 9)),
    )  # fmt: skip
    assert versions(page) == {"a": "3", "b": "4", "d": "9"}


def test_a_wrong_shape_costs_itself_only_and_drops_no_good_form() -> None:
    page = listed(
        event("ADDED", service("a", 1)),
        event("ADDED", service("b", 2, ports=7)),
        event("MODIFIED", service("a", 3, ports=7)),
        event("ADDED", {"metadata": {"name": 7}}),
        event("ADDED", service("healed", 4, ports=7)),
        event("MODIFIED", service("healed", 5)),
        event("ADDED", service("gone", 6, ports=7)),
        event("DELETED", service("gone", 7)),
        event("ADDED", service("large", 8, x="x" * 2_000)),
    )
    assert versions(page) == {"a": "1", "healed": "5"}
    assert [error.key for error in page.errors] == [("demo", "b"), ("demo", "a"), ("demo", "large"), None]
    assert "more than the limit of 2000" in str(page.errors[2])


def test_a_line_that_was_not_read_to_its_end_is_an_error() -> None:
    found = initial(list_bytes=20_000)
    line = event("ADDED", service("large", 8, x="x" * 9_000))
    assert found.take(LineCutter(2_000).feed(line)) is None
    with pytest.raises(TooLarge, match="over 20000 bytes"):  # its octets count: they were sent
        found.take(LineCutter(2_000).feed(line + line))
    assert [error.key for error in found.page.errors] == [("demo", "large")]


@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED"])
def test_octets_count_even_of_one_object_again_and_again(kind: str) -> None:
    found = initial(list_bytes=10_000)
    with pytest.raises(TooLarge):
        for version in range(1_000):
            found.take([event(kind, service("a", version)).strip()])
    assert len(found.page.objects) == 1


@pytest.mark.parametrize("value", [service("n%d"), service("n%d", ports=7), {"metadata": {}, "n": "%d"}])
def test_objects_count_be_they_good_or_not(value: dict[str, Any]) -> None:
    found = initial(list_objects=10)
    text = event("ADDED", value).strip()
    assert found.take([text.replace(b"%d", b"%d" % number) for number in range(10)]) is None
    with pytest.raises(TooLarge, match="or 10 objects"):
        found.take([text.replace(b"%d", b"ten"), END.strip()])


def marked(kind: object, **metadata: object) -> bytes:
    return event("BOOKMARK", {"kind": kind, "metadata": metadata})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (marked("Service", resourceVersion="7"), Unserved),
        (marked("Service", resourceVersion="7", annotations={"k8s.io/initial-events-end": "false"}), Unserved),
        (event("ERROR", {"code": 500, "message": "the required storage feature is disabled"}), Unserved),
        (event("ERROR", {"code": 504, "reason": "Timeout"}), ServerError),
        (event("ERROR", {"code": 410}), Gone),
        (end_of_list("Pod", 7), BadResponse),
        (end_of_list("Service", ""), BadResponse),
        (b"<html>", BadResponse),
        (b'{"kind":"ServiceList","metadata":{"resourceVersion":"7"},"items":[]}', BadResponse),
        (event("SURPRISE", {}), BadResponse),
    ],
)
def test_what_is_no_list(line: bytes, error: type[ApiError]) -> None:
    found = initial()
    found.take([event("ADDED", service("a")).strip()])
    with pytest.raises(error) as caught:
        found.take([line.strip()])
    assert type(caught.value) is error and caught.value.tenant == "acme" and caught.value.path == SERVICES.path


@pytest.mark.parametrize("annotations", [7, {"k8s.io/initial-events-end": True}, {"k8s.io/initial-events-end": None}])
def test_an_end_that_cannot_be_read_is_none(annotations: object) -> None:
    found = initial()
    assert found.take([marked("Service", resourceVersion="7", annotations=annotations).strip()]) is None
    assert len(found.page.errors) == 1


def test_lines_that_only_together_are_events_are_none() -> None:
    """JSON may be broken over lines; events may not."""
    whole = event("ADDED", service("a")).strip()
    first, second = whole[:-9] + b"\n", whole[-9:]
    for lines in ([first.strip(), second], [whole + whole], [whole + b"," + whole], [whole, whole[:-1], b"}"]):
        with pytest.raises(BadResponse):
            initial().take(list(lines))


NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.tuples(st.sampled_from(["ADDED", "ADDED", "MODIFIED", "DELETED", "bad"]), NAMES)


@given(st.lists(STEPS, max_size=40), st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_in_any_batches_the_list_is_that_of_a_map(steps: list[tuple[str, str]], cuts: list[int]) -> None:
    held: dict[str, str] = {}
    wrong: dict[str, None] = {}
    text = b""
    for version, (kind, name) in enumerate(steps):
        if kind == "bad":
            wrong[name] = None
            text += event("ADDED", service(name, version, ports="none"))
            continue
        wrong.pop(name, None)
        held.pop(name, None) if kind == "DELETED" else held.update({name: str(version)})
        text += event(kind, service(name, version))
    text += END + json.dumps({"more": 1}).encode() + b"\n"
    found, cutter, position, rest = initial(), LineCutter(10_000), 0, None
    for size in cuts * (len(text) // sum(cuts) + 1):
        lines = cutter.feed(text[position : position + size])
        position += size
        if rest is None:
            rest = found.take(lines) if lines else None
        else:
            rest += lines
    assert rest == [b'{"more": 1}']
    assert versions(found.page) == held
    assert [error.key for error in found.page.errors] == [("demo", name) for name in wrong]
