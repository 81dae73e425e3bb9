"""Waiting for something to become true, with a deadline: what every end-to-end test does instead of sleeping.

The clock is monotonic and the pause between two looks is short, so a test takes as long as the thing it waits for and
not longer. A deadline that passes raises, with the last reason why the thing was not true yet.
"""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(look: Callable[[], T], *, within: float = 10.0, every: float = 0.02, what: str = "") -> T:
    """Call `look` until it returns something true, and return that.

    An AssertionError raised by `look` counts as "not yet", so a look can be written with plain asserts; every other
    exception passes through at once.

    within: seconds until TimeoutError is raised; `look` is called at least once.
    every: seconds between the end of one call and the start of the next.
    what: words for the error, e.g. "slice of web in tenant a".
    """
    deadline = time.monotonic() + within
    while True:
        try:
            result = look()
            reason = f"last value: {result!r}"
        except AssertionError as error:
            result, reason = None, f"last assertion: {error}"
        if result:
            return result
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{what or look} did not happen within {within:g} s; {reason[:2000]}")
        time.sleep(every)
