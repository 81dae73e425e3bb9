"""A directory of state files that are kept true lazily. Nothing here is ever fatal.

A change only notes that a file is out of date. The one writer comes round later, takes what the file is to hold, or
what of that is new (tuples of immutable objects: microseconds), and writes in a thread. What changes all the time is
written seldom enough for writing one file to take at most a twentieth of the time. A file is replaced by rename, after
fsync, so it is whole or the one before; a disk that cannot be written costs a log line, a count, and another try later.
"""

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vcproxy.ops import logs, metrics

# A file that took t seconds to write is written again t * SPARING later at the earliest.
SPARING = 20.0

Job = Callable[[], None]

_log = logs.get("state")


class StateDirectory:
    """`job` gives what makes a file true, bound to data as it is now; None if it need not be. Times in seconds.

    `delay`: from a change to its writing; `retry`: after a failure; `rest`: how long nothing is written after a write,
    in parts of what that took. All but jobs belongs to the loop.
    """

    def __init__(
        self, path: Path, job: Callable[[str], Job | None], *, delay: float, retry: float = 60.0, rest: float = 0.0
    ) -> None:
        self.path = path
        self._job = job
        self._delay = delay
        self._retry = retry
        self._rest = rest
        self._due: dict[str, float] = {}
        self._cost: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()

    def note(self, name: str, *, gone: bool = False) -> None:
        """The file of this name is out of date; `gone`: and will not be written again soon."""
        if gone:
            self._cost.pop(name, None)
        wait = max(self._delay, SPARING * self._cost.get(name, 0.0))
        self._due.setdefault(name, time.monotonic() + wait)
        self._wake.set()

    async def run(self) -> None:
        """Write what is out of date, for ever."""
        while True:
            self._wake.clear()
            wait = min(self._due.values()) - time.monotonic() if self._due else None
            if wait is not None and wait <= 0:
                for name in [name for name, at in self._due.items() if at <= time.monotonic()]:
                    await asyncio.sleep(self._rest * await self._write(name))
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    async def flush(self) -> None:
        """Write all that is out of date now; at the end of the process."""
        for name in list(self._due):
            await self._write(name)

    async def _write(self, name: str) -> float:
        """Returns the seconds that it took."""
        async with self._writing:
            if self._due.pop(name, None) is None or (job := self._job(name)) is None:
                return 0.0
            started = time.monotonic()
            try:
                await asyncio.to_thread(job)
            except Exception as error:
                metrics.CACHE_FAILURES.inc()
                self._due.setdefault(name, time.monotonic() + self._retry)
                _log.error(
                    "the last good state cannot be written; all goes on without",
                    path=str(self.path / name),
                    error=str(error),
                    retry_in=self._retry,
                    exc_info=None if isinstance(error, OSError) else error,
                )
                return 0.0
            self._cost[name] = time.monotonic() - started
            return self._cost[name]


def replace(path: Path, pieces: Iterable[bytes]) -> None:
    """Make `path` hold the pieces, or stay as it is. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def append(path: Path, pieces: Iterable[bytes], *, at: int) -> None:
    """Add the pieces to a file of `at` octets; of a half-written one the reader knows. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "ab") as file:
        if file.tell() != at:
            raise OSError(errno.ESTALE, "somebody else has changed it", str(path))
        file.writelines(pieces)
        file.flush()
        os.fsync(descriptor)


def listing(path: Path) -> list[Path]:
    """The files there, without what a run that ended while it wrote left behind. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = []
    for entry in sorted(path.iterdir()):
        if entry.suffix == ".tmp":
            with contextlib.suppress(OSError):
                entry.unlink()
        else:
            found.append(entry)
    return found
