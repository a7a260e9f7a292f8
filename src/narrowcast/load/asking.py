"""What a user asks for as settings; contradictions are refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from narrowcast.errors import UserError, choices
from narrowcast.load.arrivals import read_arrivals
from narrowcast.load.fleet import Options
from narrowcast.load.scenarios import Scenario, Settings
from narrowcast.load.session import Asked
from narrowcast.measure.load.values import Slo

__all__ = ["Wishes", "check_sending", "read_duration", "read_slo", "settings_of"]

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
#: Share of the bound that the client may be late by, unless something is said.
_LATENESS_SHARE = 0.1
_LATENESS = 0.005
#: Requests under way in the offline scenario, and in a query of the multi-stream one (MLPerf Inference rules, section 6),
#: unless something is said.
_OFFLINE, _GROUP = 32, 8
_SECONDS, _TRY_SECONDS = 10.0, 5.0


@dataclass(frozen=True)
class Wishes:
    """Options as they are given; None where nothing is."""

    scenario: str | None = None
    rate: float | None = None
    arrivals: str | None = None
    concurrency: int | None = None
    seconds: float | None = None
    warmup: float = 1.0
    slo: str | None = None
    overload: float | None = None
    lateness: str | None = None
    seed: int = 0


def read_duration(text: str) -> float:
    """Return seconds.

    >>> read_duration("50ms"), read_duration("0.2 s")
    (0.05, 0.2)

    Raises:
        UserError: The text is no duration above 0.
    """
    match = re.fullmatch(r"([\d.]+(?:e-?\d+)?)\s*(s|ms|us|µs)", text.strip())
    try:
        value = float(match.group(1)) * _UNITS[match.group(2)] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"duration {text!r} cannot be read", allowed="a number with its unit: 50ms, 1.5s, 800us")
    return value


def read_slo(text: str) -> Slo:
    """Return a bound on latency.

    >>> read_slo("p99=50ms")
    Slo(percentile=99.0, seconds=0.05)

    Raises:
        UserError: The text is none.
    """
    name, _, bound = text.partition("=")
    try:
        percentile = float(name.strip().removeprefix("p")) if name.strip().startswith("p") else 0.0
    except ValueError:
        percentile = 0.0
    if not 0 < percentile < 100 or not bound:
        raise UserError(f"bound {text!r} cannot be read", allowed="a percentile and a duration: p99=50ms")
    return Slo(percentile=percentile, seconds=read_duration(bound))


def settings_of(wishes: Wishes) -> Settings:
    """Return the settings of what is asked for.

    Raises:
        UserError: There is no such scenario, a number is out of range, or two options contradict each other.
    """
    scenario = _scenario(wishes)
    for name, value in (("rate", wishes.rate), ("seconds", wishes.seconds), ("overload", wishes.overload)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value:g} is out of range", allowed="a number above 0")
    _check(scenario, wishes)
    slo = read_slo(wishes.slo) if wishes.slo else None
    if scenario is Scenario.SERVER and slo is None:
        raise UserError("the server scenario needs a bound to hold", next_step="say it: --slo p99=50ms")
    if wishes.lateness is not None:
        lateness = read_duration(wishes.lateness)
    else:
        lateness = _LATENESS if slo is None else slo.seconds * _LATENESS_SHARE
    usual = _TRY_SECONDS if scenario is Scenario.SERVER else _SECONDS
    return Settings(
        scenario=scenario,
        asked=Asked(wishes.seconds or usual, wishes.warmup, slo, wishes.seed, lateness),
        arrivals=read_arrivals(wishes.arrivals or "poisson", wishes.rate) if scenario is Scenario.RATE else None,
        rate=wishes.rate,
        concurrency=_streams(scenario, wishes.concurrency),
        group=(wishes.concurrency or _GROUP) if scenario is Scenario.MULTI_STREAM else 1,
        overload=wishes.overload or 2.0,
    )


def check_sending(settings: Settings, options: Options) -> None:
    """Make sure that how requests are sent leaves room for what is asked.

    Raises:
        UserError: Fewer connections than requests under way, or requests are given up before the bound is reached.
    """
    under_way = settings.concurrency * settings.group
    if under_way > options.connections:
        raise UserError(
            f"{under_way} requests under way need more than {options.connections} connections",
            next_step=f"allow them: --connections {under_way}",
        )
    slo = settings.asked.slo
    if slo is not None and slo.seconds > options.timeout:
        raise UserError(
            f"requests are given up after {options.timeout:g} s, before the bound of {slo.seconds:g} s is reached",
            next_step="allow more with --timeout",
        )


def _streams(scenario: Scenario, concurrency: int | None) -> int:
    if scenario in (Scenario.CLOSED, Scenario.OFFLINE):
        return concurrency or _OFFLINE
    return 1


def _scenario(wishes: Wishes) -> Scenario:
    if wishes.scenario is None:
        return Scenario.RATE if wishes.concurrency is None else Scenario.CLOSED
    try:
        return Scenario(wishes.scenario)
    except ValueError:
        raise UserError(
            f"scenario {wishes.scenario!r} is unknown", allowed=choices(wishes.scenario, list(Scenario))
        ) from None


#: Options that say something about a scenario, beside those that all have.
_MEANT: dict[Scenario, frozenset[str]] = {
    Scenario.RATE: frozenset({"rate", "arrivals"}),
    Scenario.CLOSED: frozenset({"concurrency"}),
    Scenario.SINGLE_STREAM: frozenset(),
    Scenario.MULTI_STREAM: frozenset({"concurrency"}),
    Scenario.SERVER: frozenset({"rate"}),
    Scenario.OFFLINE: frozenset({"concurrency"}),
    Scenario.STRESS: frozenset({"rate", "overload"}),
}


def _check(scenario: Scenario, wishes: Wishes) -> None:
    """Make sure that every option has something to say.

    Raises:
        UserError: One contradicts the scenario.
    """
    given = {
        "rate": wishes.rate,
        "arrivals": wishes.arrivals,
        "concurrency": wishes.concurrency,
        "overload": wishes.overload,
    }
    for name, value in given.items():
        if value is None or name in _MEANT[scenario]:
            continue
        if scenario is Scenario.CLOSED:
            raise UserError(
                f"--{name} and --concurrency contradict each other: one is an open loop, the other a closed one",
                next_step="leave one out",
            )
        meant = (
            ", ".join(f"--{one}" for one in sorted(_MEANT[scenario])) or "none of --rate, --arrivals and --concurrency"
        )
        raise UserError(f"--{name} says nothing about the scenario {scenario}", allowed=meant)
