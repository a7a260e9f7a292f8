"""Says in the log that a model sheds load, without a line for each request that it refuses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from narrowcast.serving.catalogue import Catalogue
from narrowcast.serving.watching.events import fields

__all__ = ["OverloadLog", "report_overload"]

_log = logging.getLogger(__name__)

_EVERY_SECONDS = 1.0
#: How long nothing more is said of a model that goes on shedding.
_QUIET_SECONDS = 10.0


class OverloadLog:
    """Compares what was refused with what had been refused before.

    Args:
        catalogue: The models.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._said: dict[tuple[str, str], Counter[str]] = {}
        self._quiet_until: dict[tuple[str, str], float] = {}

    def look(self, now: float) -> None:
        """Log a warning for each model version that has refused requests or let them expire since it was last said.

        Args:
            now: Seconds on any clock that never goes back.
        """
        for served in self._catalogue.served():
            key = served.name, served.version
            statistics = served.scheduler.statistics
            refused = Counter(statistics.rejected) + Counter(expired=statistics.expired)
            new = refused - self._said.get(key, Counter())
            if not new or now < self._quiet_until.get(key, now):
                continue
            self._said[key], self._quiet_until[key] = refused, now + _QUIET_SECONDS
            reasons = ", ".join(f"{reason} {count}" for reason, count in new.most_common())
            _log.warning(
                "model %s version %s refused %d requests: %s",
                *(served.name, served.version, new.total(), reasons),
                extra=fields("shed", model=served.name, version=served.version, **new),
            )


async def report_overload(catalogue: Catalogue) -> None:
    """Look once a second until cancelled."""
    log = OverloadLog(catalogue)
    while True:
        await asyncio.sleep(_EVERY_SECONDS)
        log.look(time.monotonic())
