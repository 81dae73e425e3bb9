"""Clients that never stop, and what they saw: how tests prove that nothing was lost while something happened.

TCP hides a lost packet by sending it again, but the first time a second later (RFC 6298): an answer that took that long
was lost once. UDP hides nothing.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vcproxy.lab import Outcome, Place, Reply, tcp_request, udp_request

REQUESTS: dict[str, Callable[..., Outcome]] = {"TCP": tcp_request, "UDP": udp_request}
RETRANSMITTED = 1.0
"""Seconds after which TCP repeats a SYN."""


class Traffic:
    """Requests without pause, from a thread of its own, while the context is open.

    `answers`: how often each pod answered. `losses`: what else happened, in words. Leaving the context waits for the
    request under way.
    """

    def __init__(self, place: Place, address: str, port: int, protocol: str = "TCP", *, source_port: int = 0) -> None:
        self.answers: Counter[str] = Counter()
        self.losses: list[str] = []
        self._name = f"{protocol} {address}:{port}"
        self._dial: Callable[[], Outcome] = functools.partial(
            REQUESTS[protocol], place, address, port, source_port=source_port
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def __str__(self) -> str:
        return f"{self._name}: answers {dict(self.answers)}, losses {self.losses[:5]}"

    def more(self, requests: int = 5, *, within: float = 10.0) -> None:
        """Wait until so many more requests were answered."""
        goal, deadline = self.answers.total() + requests, time.monotonic() + within
        while self.answers.total() < goal:
            if time.monotonic() > deadline or not self._thread.is_alive():
                raise TimeoutError(f"not answered {requests} times within {within:g} s: {self}")
            time.sleep(0.005)

    def _run(self) -> None:
        while not self._over.is_set():
            outcome = self._dial()
            if not isinstance(outcome, Reply):
                self.losses.append(f"at {time.time():.3f}: {outcome}")
            elif outcome.seconds >= RETRANSMITTED:
                self.losses.append(f"at {time.time():.3f}: {outcome.pod} answered after {outcome.seconds:.2f} s")
            else:
                self.answers[outcome.pod] += 1
            self._over.wait(0.01)  # leaves a core to those who are being tested
