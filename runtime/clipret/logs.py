"""Logging for the commands. The library logs through `logging` and is silent unless a program configures it."""

import json
import logging
import sys
import time
from typing import Literal

__all__ = ["LEVELS", "Format", "configure", "is_configured", "is_json", "reset"]

Format = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")
_PACKAGES = ("clipret", "clipret_export", "clipret_training", "uvicorn")  # uvicorn logs the faults of a service
_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the moment of writing, not at the moment of configuring."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: time (ISO 8601, UTC), level, logger, message, fields of `extra`, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{whole}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    """Time (UTC), level, logger, message."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")


def configure(level: str = "warning", form: Format = "text") -> None:
    """Log clipret's messages to stderr; a second call replaces the first.

    Args:
        level: The lowest level that is written: "debug", "info", "warning" or "error".
        form: "text", or "json" for one JSON object per line.
    """
    reset()
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    for name in _PACKAGES:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False


def reset() -> None:
    """Undo `configure`."""
    for name in _PACKAGES:
        logger = logging.getLogger(name)
        for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
            logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


def is_configured() -> bool:
    """Whether `configure` was called."""
    return any(isinstance(handler, _StderrHandler) for handler in logging.getLogger(_PACKAGES[0]).handlers)


def is_json() -> bool:
    """Whether messages are written as JSON."""
    handlers = logging.getLogger(_PACKAGES[0]).handlers
    return any(isinstance(handler.formatter, _JsonFormatter) for handler in handlers)
