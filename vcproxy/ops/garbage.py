"""Python's cycle collector, told what a daemon's memory is like.

Nearly all that a brain or an agent holds lives until its tenant changes it and is in no cycle: reference counts free
it. The collector does not know that, looks at some hundred thousand objects again and again while a first load goes on
(a third of the time that planning takes), and later now and then at all of them at once, half a second in which no
tenant is served. So it looks at all of them hardly ever, and never again at what was there when the first load was
done.

Young objects it looks at in small portions. Each is looked at twice whatever the size of a portion, so a large one
saves nothing, and nobody is served meanwhile: 1,000 take 3 ms where memory is as cold as a brain's, and ten times that
24 ms, which was what one event in a hundred waited for.
"""

import contextlib
import ctypes
import gc

_YOUNG, _MIDDLE, _OLD = 200, 2, 250_000
"""Objects made until the youngest are looked at; times of that until the middle ones are; and until all are."""


_M_ARENA_MAX = -8  # malloc.h


def tune() -> None:
    """At the start, when all modules are loaded, and before there are threads."""
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
    # Threads take turns at the interpreter: an arena of libc's heap for each holds memory and saves no waiting.
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def settled() -> None:
    """The first load is done: what is there now stays. Costs a look at the young objects alone."""
    gc.collect(1)
    gc.freeze()


def sweep() -> None:
    """Much of what there was has been let go: free what of it is in cycles. Half a second for a thousand tenants."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
