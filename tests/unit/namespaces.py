"""A network namespace without a name: it is unshared, not added, so it goes with its last process whatever happens."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def _enter(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "cannot change the network namespace: the tests need root")


@contextmanager
def own_namespace() -> Iterator[None]:
    """This thread, and what it starts, is in a network namespace of its own."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(_LIBC.unshare(_CLONE_NEWNET))
        try:
            yield
        finally:
            _enter(_LIBC.setns(home, _CLONE_NEWNET))
    finally:
        os.close(home)
