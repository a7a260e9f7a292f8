"""Evidence as a real run would leave it, and the ways in which runs go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from narrowcast.artifacts.manifest import (
    Blame,
    Candidate,
    DataRecord,
    Environment,
    Evidence,
    Histogram,
    Measurement,
    MetricRecord,
    ModelRecord,
    OperatorShare,
    Verdict,
)
from narrowcast.recipes.budget import Budget, Limit, Standing
from narrowcast.recipes.plan import OperatorPlan, Plan, TensorRange
from narrowcast.recipes.recipe import DynamicInt8, Float16Weights, Optimise, Recipe, StaticInt8, WeightOnlyInt8
from narrowcast.recipes.target import Target

NAN = math.nan
PAIRED = (
    "30 rounds of 14 runs each, interleaved in random order after 48 warm-up runs until steady; bootstrap over rounds"
)
SCORED = "top1 on the report part; paired bootstrap over samples"
HOSTILE = "<script>alert('$x^2$ & \"co\"')</script>"
CHOSEN = "int8 static, 3 groups kept"


def standing(measure: str, bound: float, at_least: bool, words: str, value: float) -> Standing:
    limit = Limit(measure=measure, bound=bound, at_least=at_least, text=words)
    return Standing(limit=limit, value=value, met=limit.holds(value))


def judged(accuracy: float, latency: float, size: float) -> tuple[Standing, ...]:
    return (
        standing("accuracy", 0.9386, True, "top1 may lose 0.5% of the original", accuracy),
        standing("latency", 0.0062, False, "at least 2x faster", latency),
        standing("size", 6e6, False, "size at most 6 MB", size),
    )


def candidate(name: str, accuracy: float, latency: float, size: int, **more: Any) -> Candidate:
    standings = judged(accuracy, latency, size)
    fields: dict[str, Any] = {
        "recipe": Recipe(name=name, steps=(Optimise(),)),
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.011,
        "accuracy_high": accuracy + 0.009,
        "latency": latency,
        "speedup": 0.0124 / latency,
        "speedup_low": 0.0124 / latency - 0.04,
        "speedup_high": 0.0124 / latency + 0.03,
        "size": size,
        "memory": 61_400_000.0 + 3 * size,
        "standings": standings,
        "feasible": all(s.met for s in standings),
        "seconds": 14.2,
    }
    return Candidate(name=name, **(fields | more))


def measure(
    name: str, subject: Any, value: float, unit: str, low: Any = None, high: Any = None, n: int = 30
) -> Measurement:
    protocol = SCORED if name.startswith("accuracy") else PAIRED if name.startswith("lat") else "file size in bytes"
    return Measurement(
        measure=name, subject=subject, value=value, unit=unit, low=low, high=high, samples=n, protocol=protocol
    )


def measurements() -> tuple[Measurement, ...]:
    return (
        measure("accuracy", "original", 0.9433, "", 0.9281, 0.9572, 900),
        measure("accuracy", "artifact", 0.9411, "", 0.9254, 0.9551, 900),
        measure("accuracy_drop", "artifact", 0.0022, "", -0.0031, 0.0078, 900),
        measure("size", "original", 18_634_112.0, "bytes", n=1),
        measure("size", "artifact", 4_913_204.0, "bytes", n=1),
        measure("compression", "ratio", 3.7927, "x", n=1),
        measure("latency_p50", "original", 0.01241, "s", 0.01233, 0.01252),
        measure("latency_p50", "artifact", 0.00538, "s", 0.00534, 0.00543),
        measure("latency_p50", "ratio", 2.307, "x", 2.281, 2.334),
        measure("latency_p90", "original", 0.01377, "s", 0.01352, 0.01431, 420),
        measure("latency_p90", "artifact", 0.00611, "s", 0.00596, 0.00634, 420),
        measure("throughput", "original", 91.37, "samples/s", 90.2, 92.4, 8),
        measure("throughput", "artifact", 241.8, "samples/s", 238.6, 245.1, 8),
        measure("throughput", "ratio", 2.646, "x", 2.6, 2.7, 8),
        measure("best_batch", "original", 4, "", n=1),
        measure("best_batch", "artifact", 8, "", n=1),
        measure("latency_best_batch_p50", "original", 0.04378, "s", 0.0433, 0.0443, 8),
        measure("latency_best_batch_p50", "artifact", 0.03309, "s", 0.0326, 0.0335, 8),
        measure("peak_memory", "original", 127_402_000.0, "bytes", n=1),
        measure("peak_memory", "artifact", 83_886_000.0, "bytes", n=1),
        measure("peak_memory", "ratio", 1.5187, "x", n=1),
        measure("load_time", "original", 0.1312, "s", n=1),
        measure("load_time", "artifact", 0.0871, "s", n=1),
        measure("load_time", "ratio", 1.02, "x", 0.97, 1.08, n=5),
    )


def candidates() -> tuple[Candidate, ...]:
    static = Recipe(name="int8 static", steps=(Optimise(), StaticInt8()))
    return (
        candidate("optimise", 0.9440, 0.0119, 18_402_000, kept_float=0),
        candidate("fp16 weights", 0.9440, 0.0121, 9_380_000, speedup_low=0.99, speedup_high=1.06),
        candidate("int8 weights only", 0.9430, 0.01195, 4_790_000, memory=None),
        candidate("int8 dynamic", 0.9150, 0.0089, 4_870_000, recipe=Recipe(name="x", steps=(DynamicInt8(),))),
        candidate("int8 static", 0.9290, 0.0049, 4_760_000, recipe=static),
        candidate("int8 static, 1 group kept", 0.9352, 0.00507, 4_802_000, kept_float=1),
        candidate(CHOSEN, 0.9421, 0.00538, 4_913_204, kept_float=3, memory=83_886_000.0),
        candidate("int8 static, 6 groups kept", 0.9428, 0.00602, 5_220_000, kept_float=6),
        Candidate(
            name="int8 static, signed",
            recipe=static,
            failure="[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for ConvInteger(10)\n"
            "node with name '/features/features.0/Conv_quant'",
            seconds=3.1,
        ),
    )


KINDS = ("Conv", "Conv", "Add", "GlobalAveragePool", "MatMul")


def blame() -> tuple[Blame, ...]:
    return tuple(
        Blame(
            group=f"/features/features.{i}/conv/conv.{i % 3}/conv.{i % 3}.0/{KINDS[i % 5]}_output",
            op_type=KINDS[i % 5],
            noise=0.42 * 0.55**i,
            seconds=0.0011 / (i + 1),
            kept_float=i < 3,
        )
        for i in range(28)
    )


def histograms() -> tuple[Histogram, ...]:
    rng = np.random.default_rng(0)
    found: list[Histogram] = []
    for i, name in enumerate(("relu6_output", "expand/Conv_output_0", "project/Add", "gap/GlobalAveragePool_output_0")):
        values = rng.standard_t(3, 60_000) * (1 + i) if i % 2 else np.abs(rng.normal(0, 1 + i, 60_000))
        low, high = float(values.min()), float(np.quantile(values, 0.9995))
        step = (high - low) / (255 if i else 24)
        snapped = low + np.round((np.clip(values, low, high) - low) / step) * step
        edges = np.linspace(low, float(values.max()), 81)
        before, after = np.histogram(values, edges)[0], np.histogram(snapped, edges)[0]
        found.append(
            Histogram(
                tensor=f"/features/features.{i}/block/{name}",
                sqnr_db=14.3 + 6.1 * i,
                edges=tuple(map(float, edges)),
                before=tuple(map(int, before)),
                after=tuple(map(int, after)),
            )
        )
    return tuple(found)


def plan() -> Plan:
    groups = blame()
    operators = tuple(
        OperatorPlan(
            group=item.group,
            op_type=item.op_type,
            fused=("Relu",) if i % 2 else (),
            format="fp32" if item.kept_float else "fp16" if i == 20 else "int8",
            executed=i != 20,
            remedies=() if item.kept_float else ("equalised", "bias corrected"),
            sqnr_db=None if item.kept_float else 21.7 + i,
        )
        for i, item in enumerate(groups)
    )
    ranges = tuple(
        TensorRange(
            tensor=f"{item.group}_0", low=-1.5, high=4.25, scale=0.02255, zero_point=67, method="entropy", sqnr_db=33.1
        )
        for item in groups[:5]
    )
    keep = frozenset(item.group for item in groups if item.kept_float)
    steps = (Optimise(), StaticInt8(keep_float=keep))
    return Plan(recipe=Recipe(name=CHOSEN, steps=steps), target=Target(threads=2), operators=operators, ranges=ranges)


def profile() -> tuple[OperatorShare, ...]:
    rows = (("Conv", 52, 0.0098, 0.79, 13_502_000), ("Gemm", 1, 0.0009, 0.07, 5_124_000), ("Add", 10, 0.0007, 0.06, 0))
    more = (("GlobalAveragePool", 1, 0.0004, 0.03, 0), ("Clip", 35, 0.0003, 0.025, 280))
    return tuple(
        OperatorShare(op_type=o, count=c, seconds=s, time_share=t, bytes=b) for o, c, s, t, b in (*rows, *more)
    )


def base() -> dict[str, Any]:
    return {
        "narrowcast": "0.1.0",
        "created": "2026-03-09T14:05:00+00:00",
        "model": ModelRecord(
            ref="py:efficientnet_lite:lite0", sha256="3f9a" * 16, bytes=18_634_112, random_weights=False
        ),
        "data": DataRecord(
            ref="folder:photos/val",
            sha256="b71c" * 16,
            seed=7,
            calibration=128,
            search=600,
            report=900,
            note="Crops of one photograph stay in one part.",
        ),
        "metric": MetricRecord(name="top1", unit="", higher_is_better=True),
        "budget": Budget.parse(max_drop="0.5%", speedup="2x", size="6MB"),
        "target": Target(threads=2),
        "environment": Environment(
            processor="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            cores=2,
            instructions=("avx2", "avx512f", "avx512_vnni", "amx_int8"),
            governor=None,
            memory_bytes=16_777_000_000,
            system="Linux 6.1.0",
            load=0.42,
            versions={"python": "3.11.7", "narrowcast": "0.1.0", "onnxruntime": "1.23.2", "numpy": "2.4.6"},
        ),
        "chosen": CHOSEN,
        "verdict": Verdict(
            met=True,
            headline="2.31× faster and 3.79× smaller, with 0.22 points of top1 lost.",
            standings=judged(0.9411, 0.00538, 4_913_204.0),
        ),
        "measurements": measurements(),
        "candidates": candidates(),
        "blame": blame(),
        "profile": profile(),
        "histograms": histograms(),
        "plan": plan(),
        "evaluations": 9,
        "seconds": 128.4,
    }


@pytest.fixture
def make() -> Callable[..., Evidence]:
    """Give a function that returns the evidence of a run that met its budget, with some fields replaced."""
    return lambda **changed: Evidence(**(base() | changed))


@pytest.fixture
def met(make: Callable[..., Evidence]) -> Evidence:
    """Return a run that met its budget."""
    return make()


@pytest.fixture
def not_met(make: Callable[..., Evidence]) -> Evidence:
    """Return a run on random weights with one candidate and one failure, no blame, NaN wherever one can be."""
    only = candidate("fp16 weights", NAN, 0.0121, 9_380_000, accuracy_low=NAN, accuracy_high=NAN, speedup_low=0.98,
                     speedup_high=1.05, memory=None, feasible=False)  # fmt: skip
    broken = Candidate(name=HOSTILE, recipe=Recipe(name="x", steps=(WeightOnlyInt8(),)), failure=f"refused {HOSTILE}")
    recipe = Recipe(name="fp16 weights", steps=(Optimise(), Float16Weights()))
    return make(
        model=ModelRecord(ref=HOSTILE, sha256="00ff" * 16, bytes=18_634_112, random_weights=True),
        metric=MetricRecord(name="sqnr", unit="dB", higher_is_better=True),
        chosen="fp16 weights",
        verdict=Verdict(
            met=False,
            headline="The budget was not met: the fastest candidate takes 12.1 ms of the 6.2 ms allowed.",
            standings=(
                standing("accuracy", 30.0, True, "sqnr at least 30", NAN),
                standing("latency", 0.0062, False, "at least 2x faster", 0.0121),
                standing("size", 6e6, False, "size at most 6 MB", 6_000_400.0),
                standing("memory", 3e8, False, "peak memory at most 300 MB", math.inf),
            ),
            advice=("Allow 12.1 ms, or use a processor with VNNI.", f"Look at {HOSTILE}."),
        ),
        measurements=(
            measure("accuracy", "original", math.inf, "dB"),
            measure("accuracy", "artifact", NAN, "dB", NAN, NAN),
            measure("accuracy_drop", "artifact", NAN, "dB"),
            measure("latency_p50", "original", 0.0124, "s", 0.0120, 0.0129, 9),
            measure("latency_p50", "artifact", 0.0121, "s", 0.0117, 0.0127, 9),
            measure("latency_p50", "ratio", 1.02, "x", 0.98, 1.05, 9),
            measure("throughput", "artifact", NAN, "samples/s"),
            measure(HOSTILE, "artifact", NAN, HOSTILE),
        ),
        candidates=(only, broken),
        blame=(),
        histograms=(
            Histogram(tensor=HOSTILE + "层\n" * 40, sqnr_db=NAN, edges=(0.0, 1.0, 2.0), before=(3, 0), after=(0, 3)),
            Histogram(tensor="bad", sqnr_db=math.inf, edges=(0.0, NAN, 2.0), before=(3, 0), after=(0, 3)),
        ),
        profile=(OperatorShare(op_type=HOSTILE, count=1, seconds=NAN, time_share=NAN, bytes=0),),
        plan=Plan(
            recipe=recipe,
            target=Target(),
            operators=(
                OperatorPlan(group=HOSTILE, op_type="Conv", format="fp16", executed=False, sqnr_db=NAN),
                OperatorPlan(group="b", op_type="Gemm"),
            ),
        ),
        seconds=NAN,
    )


@pytest.fixture
def bare(make: Callable[..., Evidence]) -> Evidence:
    """Return the least evidence there can be: no measurement, candidate, blame, profile, histogram or operator."""
    empty = Plan(recipe=Recipe(name="optimise", steps=()), target=Target())
    verdict = Verdict(met=True, headline="There was nothing to keep.")
    return make(
        measurements=(),
        candidates=(),
        blame=(),
        profile=(),
        histograms=(),
        plan=empty,
        verdict=verdict,
        budget=Budget(),
    )
