"""Durations as Go writes them ("24h0m0s", "1.5s", "250ms"): the form of every period in kube-proxy's configuration."""

import re

_NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_LONGEST = (1 << 63) - 1


class Duration(int):
    """A number of nanoseconds, as Go's time.Duration."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Text to duration. Raises ValueError for what Go's ParseDuration refuses."""
        sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
        if rest == "0":
            return cls(0)
        parts = _PART.findall(rest)
        if not parts or "".join(number + unit for number, unit in parts) != rest:
            raise ValueError(f"{text[:32]!r} is no duration: write it like 30s, 5m or 1h30m")
        total = round(sum(float(number) * _NANOSECONDS[unit] for number, unit in parts))
        if total > _LONGEST:
            raise ValueError(f"{text[:32]!r} is longer than 292 years")
        return cls(sign * total)

    @property
    def seconds(self) -> int:
        """Whole seconds, rounded down, as the sysctls want them."""
        return int(self) // 1_000_000_000

    def __str__(self) -> str:
        """As Go prints it: this is what files that kube-proxy wrote hold."""
        total = int(self)
        if total < 0:
            return "-" + str(Duration(-total))
        for unit in ("ns", "µs", "ms"):
            if 0 < total < _NANOSECONDS["s"] and total < _NANOSECONDS[unit] * 1_000:
                return _number(total, _NANOSECONDS[unit]) + unit
        hours, rest = divmod(total, _NANOSECONDS["h"])
        minutes, rest = divmod(rest, _NANOSECONDS["m"])
        text = _number(rest, _NANOSECONDS["s"]) + "s"
        if hours or minutes:
            text = f"{minutes}m{text}"
        return f"{hours}h{text}" if hours else text


def _number(total: int, unit: int) -> str:
    whole, rest = divmod(total, unit)
    digits = len(str(unit)) - 1
    return f"{whole}.{rest:0{digits}d}".rstrip("0").rstrip(".") if rest else str(whole)
