"""Static INT8: standard QuantizeLinear and DequantizeLinear nodes, ranges from calibration, remedies where they help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor, session_of
from narrowcast.models.graph import Graph
from narrowcast.recipes.plan import OperatorPlan, Plan, TensorRange
from narrowcast.recipes.recipe import StaticInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import calibrate, live_bytes, sample_batch
from narrowcast.transforms.equalise import equalise
from narrowcast.transforms.groups import Group, boundaries, find_groups, quantised_groups, root_of
from narrowcast.transforms.qdq import write_qdq
from narrowcast.transforms.ranges import Quantizer, TensorStatistics
from narrowcast.transforms.smoothing import smooth
from narrowcast.transforms.walk import Progress, Walk, noise_share
from narrowcast.transforms.weights import store_tables

__all__ = ["Memory", "StaticResult", "quantise_static"]

#: Bytes that the samples of the walk may take, both values of all tensors alive together, and samples at the most.
WALK_BYTES, WALK_SAMPLES = 800_000_000, 64
#: Calibration samples on which variants of the graph are compared: ranges from one half, judged on the other.
TRIAL_CALIBRATION, TRIAL_SAMPLES = 48, 12
PLAIN, VARIANTS = "plain", ("equalised", "smoothed")


@dataclass
class Memory:
    """What one quantisation of a graph found out, for the next one of the same graph with other groups in FP32.

    Attributes:
        variant: Which variant of the graph was the easiest to quantise; empty while unknown.
        statistics: Statistics of the plain graph's tensors.
        quantizers: Quantizers that were settled in the plain graph.
    """

    variant: str = ""
    statistics: dict[str, TensorStatistics] = field(default_factory=dict[str, TensorStatistics])
    quantizers: dict[str, Quantizer] = field(default_factory=dict[str, Quantizer])

    def recall(self, plan: Plan, *, signed: bool) -> None:
        """Take over what the plan of a finished quantisation tells, so that a resumed run goes on as an unbroken one.

        Args:
            plan: The plan of the quantisation with no group in FP32.
            signed: Whether its activations are INT8 (else UINT8).
        """
        remedies = {remedy for operator in plan.operators for remedy in operator.remedies}
        self.variant = next((name for name in VARIANTS if name in remedies), PLAIN)
        self.quantizers = {}
        if self.variant == PLAIN:
            self.quantizers = {r.tensor: Quantizer(r.scale, r.zero_point, signed, r.method) for r in plan.ranges}


@dataclass
class StaticResult:
    """A quantised graph and how it came to be.

    Attributes:
        graph: The graph with QuantizeLinear and DequantizeLinear nodes.
        operators: What happened to each operator group.
        ranges: The range of each quantised tensor.
        histograms: For the worst tensors, values before and after: bin edges and two arrays of counts.
    """

    graph: Graph
    operators: list[OperatorPlan]
    ranges: list[TensorRange]
    histograms: dict[str, tuple[list[float], list[int], list[int]]] = field(default_factory=dict)


def quantise_static(
    graph: Graph,
    data: Dataset,
    step: StaticInt8,
    rules: FusionRules,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> StaticResult:
    """Return a graph whose operator groups compute in INT8, but for those that the step keeps in FP32.

    Args:
        graph: The FP32 graph.
        data: Calibration samples.
        step: What to do.
        rules: Which operators the target runtime computes in integers, and what it fuses.
        progress: Called with a stage's name and the share of it that is done.
        memory: What earlier calls on the same graph and data found out; it is added to.
    """
    report = progress or _silent
    memory = memory if memory is not None else Memory()
    walk = _prepare(graph, data, step, rules, report, memory)
    walk.run(report)
    if memory.variant == PLAIN:
        memory.quantizers |= walk.quantizers
    quantised = store_tables(write_qdq(walk.graph, walk.groups, walk.weights, walk.quantizers, rules))
    return StaticResult(quantised, walk.operators(), walk.tensor_ranges(), walk.histograms)


def _silent(name: str, share: float) -> None:
    """Do nothing."""


@dataclass
class _Variant:
    """A graph of the same function, the names that it changed, and its groups."""

    name: str
    graph: Graph
    changed: frozenset[str]
    every: list[Group]
    groups: list[Group]
    executor: StagedExecutor
    tensors: set[str]


def _prepare(
    graph: Graph, data: Dataset, step: StaticInt8, rules: FusionRules, report: Progress, memory: Memory
) -> Walk:
    plain = _variant(PLAIN, graph, frozenset(), step, rules)
    if not plain.tensors <= memory.statistics.keys():
        found = calibrate(plain.executor, data, plain.tensors, lambda n: report("ranges", n / data.size))
        memory.statistics |= found
    chosen, statistics = plain, memory.statistics
    if memory.variant != PLAIN:
        variants = {v.name: v for v in (plain, *_variants(plain, memory.statistics, step, rules))}
        if not memory.variant:
            memory.variant = _easiest(list(variants.values()), data, step, rules, report)
        chosen = variants.get(memory.variant, plain)
    if chosen is not plain:
        statistics = calibrate(chosen.executor, data, chosen.tensors, lambda n: report("ranges", n / data.size))
    known = memory.quantizers if chosen is plain else {}
    return _walk(chosen, data, step, rules, statistics, known, WALK_SAMPLES)


def _variant(name: str, graph: Graph, changed: frozenset[str], step: StaticInt8, rules: FusionRules) -> _Variant:
    every = find_groups(graph, rules)
    groups = quantised_groups(graph, every, rules, step.keep_float)
    producers = graph.producers()
    tensors = {root_of(name, producers, rules) for group in groups for name in group.inputs}
    tensors |= {group.output for group in groups if group.kind != "linear" or group.op_type in rules.integer_output}
    return _Variant(name, graph, changed, every, groups, StagedExecutor(graph, boundaries(every), tensors), tensors)


def _variants(
    plain: _Variant, statistics: dict[str, TensorStatistics], step: StaticInt8, rules: FusionRules
) -> Iterator[_Variant]:
    """Yield graphs of the same function whose tensors may be easier to quantise."""
    if not step.equalise:
        return
    graph, factors = equalise(plain.graph, plain.groups, statistics)
    if factors:
        yield _variant("equalised", graph, frozenset(factors), step, rules)
    graph, groups = smooth(plain.graph, plain.groups, statistics)
    if groups:
        yield _variant("smoothed", graph, frozenset(groups), step, rules)


def _easiest(variants: list[_Variant], data: Dataset, step: StaticInt8, rules: FusionRules, report: Progress) -> str:
    """Return the name of the variant with the least noise at the outputs, on samples that it was not fitted to."""
    if len(variants) == 1:
        return variants[0].name
    half = max(1, data.size // 2)
    fitted = data.take(np.unique(np.linspace(0, half - 1, min(half, TRIAL_CALIBRATION)).astype(np.int64)))
    held_out = sample_batch(data.take(np.arange(min(half, data.size - 1), data.size)), TRIAL_SAMPLES)
    quick = step.model_copy(update={"reconstruct": False, "ranges": ("minmax",)})
    noise: list[float] = []
    for number, variant in enumerate(variants):
        report(f"trying the graph {variant.name}", number / len(variants))
        statistics = calibrate(variant.executor, fitted, variant.tensors)
        walk = _walk(variant, fitted, quick, rules, statistics, {}, TRIAL_SAMPLES)
        walk.run(_silent)
        graph = write_qdq(walk.graph, walk.groups, walk.weights, walk.quantizers, rules)
        names = list(variant.executor.outputs)
        outputs = session_of(graph, optimise=True).run(names, held_out)
        exact = variant.executor.run_from(0, held_out)
        noise.append(sum(noise_share(exact[n], np.asarray(o)) for n, o in zip(names, outputs, strict=True)))
    return variants[int(np.argmin(noise))].name


def _walk(
    variant: _Variant,
    data: Dataset,
    step: StaticInt8,
    rules: FusionRules,
    statistics: dict[str, TensorStatistics],
    known: dict[str, Quantizer],
    most: int,
) -> Walk:
    per_sample = live_bytes(variant.executor, sample_batch(data, 1))
    count = max(2, min(most, data.size, int(WALK_BYTES / (2 * per_sample))))
    kept = {name: statistics[name] for name in variant.tensors}
    changed = dict.fromkeys(variant.changed, variant.name)
    feeds = sample_batch(data, count)
    return Walk(
        variant.graph, variant.every, variant.groups, variant.executor, kept, step, rules, feeds, changed, known
    )
