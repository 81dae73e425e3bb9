"""Logs: one line an event, with tenant, node and revision as fields, never as prose.

Whatever a tenant wrote is a value of a field, cut to a bounded length and escaped by the renderer, so a tenant cannot
forge lines or flood a disk with one object.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import msgspec

# structlog would import rich, if it is there, for tracebacks that we do not have it draw: a tenth of a daemon's start.
if "rich" in sys.modules:
    import structlog
else:
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog

    del sys.modules["rich"]

LONGEST_VALUE = 512


def configure(level: str = "info", fmt: str = "json") -> None:
    """Set up the process's logs on stderr. `fmt` is json (for machines) or text (for people)."""
    renderer: Any
    if fmt == "json":
        renderer = structlog.processors.JSONRenderer(serializer=_to_json)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            _bound_values,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard module; only their warnings are of interest.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")


def get(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose lines carry `component=name`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(component=name)
    return logger


def _bound_values(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > LONGEST_VALUE and key != "exception":
            event[key] = value[:LONGEST_VALUE] + "..."
    return event


def _to_json(value: Any, **_: Any) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
