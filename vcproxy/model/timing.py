"""When a change happened at each stage: one histogram shows the true end-to-end latency and each stage's share."""

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """Unix nanoseconds of the oldest change inside; 0: unknown.

    `event`: when the API object changed, by its trigger-time annotation. `received`: when the brain got it.
    `compiled`: when it was part of the tenant model.
    """

    event: int = 0
    received: int = 0
    compiled: int = 0
