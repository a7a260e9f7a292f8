"""Static INT8: standard QuantizeLinear and DequantizeLinear nodes, ranges from calibration, remedies where they help."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.dataset import Dataset
from narrowcast.models.execution import StagedExecutor, session_of
from narrowcast.models.graph import Graph
from narrowcast.recipes.plan import OperatorPlan, Plan, TensorRange
from narrowcast.recipes.recipe import StaticInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.calibration import calibrate, sample_batch, spread, walk_samples
from narrowcast.transforms.equalise import equalise, find_classes
from narrowcast.transforms.groups import Group, boundaries, find_groups, quantised_groups, rounded_tensors
from narrowcast.transforms.insertion import Disturbance, insertion_noise, noise_share, rounded_tensor, rounded_weight
from narrowcast.transforms.operators import Operators
from narrowcast.transforms.qdq import write_qdq
from narrowcast.transforms.ranges import Quantizer, TensorStatistics, quantizer_of
from narrowcast.transforms.smoothing import smooth
from narrowcast.transforms.walk import Progress, Walk, silent
from narrowcast.transforms.weights import store_tables

__all__ = ["Memory", "Prepared", "StaticResult", "prepare_static", "quantise_static"]

Array = NDArray[Any]

#: Samples of the walk, at the most.
WALK_SAMPLES = 40
#: Samples on which it is judged where noise comes from, and whether evening out channels lowers it.
INSERTION_SAMPLES = 4
#: Samples that the histograms of equalised tensors come from; their extremes are known from all samples.
HISTOGRAM_SAMPLES = 64
#: Calibration samples on which smoothing is judged: ranges from one half, noise on the other.
TRIAL_CALIBRATION, TRIAL_SAMPLES = 48, 12
#: A remedy must bring the noise below this share of what it is without.
WORTHWHILE = 0.97


@dataclass
class Memory:
    """What one quantisation of a graph found out, for the next one of the same graph with other groups in FP32.

    Attributes:
        prepared: The graph as it is quantised, None before the first time.
        quantizers: Quantizers that were settled, by tensor.
    """

    prepared: Prepared | None = None
    quantizers: dict[str, Quantizer] = field(default_factory=dict[str, Quantizer])

    def recall(self, plan: Plan, *, signed: bool) -> None:
        """Take over what the plan of a finished quantisation tells, so that a resumed run goes on as an unbroken one.

        Args:
            plan: The plan of the quantisation with no group in FP32.
            signed: Whether its activations are INT8 (else UINT8).
        """
        self.quantizers = {r.tensor: Quantizer(r.scale, r.zero_point, signed, r.method) for r in plan.ranges}


@dataclass
class Prepared:
    """A graph made ready for quantisation: the same function, its channels evened out where that helps.

    Attributes:
        graph: The FP32 graph.
        every: All its operator groups.
        groups: Those that compute in integers when none is kept in FP32.
        executor: The graph, cut at the groups.
        tensors: Tensors that get a quantizer when no group is kept in FP32.
        statistics: Their statistics.
        changed: Names of tensors and groups that a remedy changed, with the name of the remedy.
    """

    graph: Graph
    every: list[Group]
    groups: list[Group]
    executor: StagedExecutor
    tensors: set[str]
    statistics: dict[str, TensorStatistics]
    changed: dict[str, str]


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
    report = progress or silent
    memory = memory if memory is not None else Memory()
    prepared = prepare_static(graph, data, step, rules, report, memory)
    groups = quantised_groups(prepared.graph, prepared.every, rules, step.keep_float)
    walk = _walk(prepared, groups, data, step, rules, memory.quantizers, WALK_SAMPLES)
    walk.run(report)
    memory.quantizers |= walk.quantizers
    quantised = store_tables(write_qdq(walk.graph, walk.groups, walk.weights, walk.quantizers, rules))
    return StaticResult(quantised, walk.operators(), walk.tensor_ranges(), walk.histograms)


def prepare_static(
    graph: Graph,
    data: Dataset,
    step: StaticInt8,
    rules: FusionRules,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> Prepared:
    """Return the graph as it will be quantised, with the statistics of its tensors; ``memory`` keeps it.

    Which groups the step keeps in FP32 does not matter: every candidate of a graph starts from the same one.
    """
    report = progress or silent
    memory = memory if memory is not None else Memory()
    if memory.prepared is None:
        prepared = _cut(graph, rules, {}, {})
        prepared.statistics = calibrate(
            prepared.executor, data, prepared.tensors, lambda n: report("ranges", n / data.size)
        )
        if step.equalise:
            prepared = _equalised(prepared, data, rules, report)
            prepared = _smoothed(prepared, data, step, rules, report)
        memory.prepared = prepared
    return memory.prepared


def _cut(
    graph: Graph, rules: FusionRules, changed: dict[str, str], statistics: dict[str, TensorStatistics]
) -> Prepared:
    every = find_groups(graph, rules)
    groups = quantised_groups(graph, every, rules, frozenset())
    tensors = rounded_tensors(graph, groups, rules)
    executor = StagedExecutor(graph, boundaries(every), tensors)
    kept = {name: statistics[name] for name in tensors & statistics.keys()}
    return Prepared(graph, every, groups, executor, tensors, kept, changed)


def _equalised(plain: Prepared, data: Dataset, rules: FusionRules, report: Progress) -> Prepared:
    """Even out the channels of those classes of tensors where it lowers the noise that rounding brings to the outputs."""
    classes = find_classes(plain.graph, plain.groups, plain.statistics)
    if not classes:
        return plain
    operators, readers = Operators(plain.graph), {group.name: group for group in plain.groups}
    disturbances: dict[str, list[Disturbance]] = {}
    owners: dict[str, list[int]] = {}
    for number, found in enumerate(classes):
        for tensor in found.tensors & plain.statistics.keys():
            quantizers = _minmax_pair(plain.statistics[tensor], found.factor, rules)
            disturbances.setdefault(tensor, []).extend(
                (rounded_tensor(tensor, quantizers[0]), rounded_tensor(tensor, quantizers[1], found.factor))
            )
            owners.setdefault(tensor, []).append(number)
        for group in (readers[name] for name in found.readers):
            disturbances.setdefault(group.output, []).extend(
                (rounded_weight(operators, group), rounded_weight(operators, group, found.factor))
            )
            owners.setdefault(group.output, []).append(number)
    feeds = sample_batch(data, INSERTION_SAMPLES)
    noise = insertion_noise(plain.executor, feeds, disturbances, lambda share: report("evening out channels", share))
    before, after = np.zeros(len(classes)), np.zeros(len(classes))
    for tensor, numbers in owners.items():
        pairs = np.array(noise[tensor]).reshape(-1, 2)
        np.add.at(before, numbers, pairs[:, 0])
        np.add.at(after, numbers, pairs[:, 1])
    helpful = [found for found, b, a in zip(classes, before, after, strict=True) if a < WORTHWHILE * b]
    tensors = {name for found in helpful for name in found.tensors}
    prepared = _cut(
        equalise(plain.graph, helpful),
        rules,
        dict.fromkeys(tensors, "equalised"),
        {name: stats for name, stats in plain.statistics.items() if name not in tensors},
    )
    some = data.take(spread(data.size, HISTOGRAM_SAMPLES))
    changed = prepared.tensors & tensors
    prepared.statistics |= calibrate(prepared.executor, some, changed) if changed else {}
    for found in helpful:
        for tensor in found.tensors & changed:
            before = plain.statistics[tensor]
            assert before.channel_low is not None
            assert before.channel_high is not None
            prepared.statistics[tensor].cover(before.channel_low / found.factor, before.channel_high / found.factor)
    return prepared


def _minmax_pair(stats: TensorStatistics, factor: Array, rules: FusionRules) -> tuple[Quantizer, Quantizer]:
    """Return min-max quantizers of a tensor as it is and with its channels divided by a factor."""
    assert stats.channel_low is not None
    assert stats.channel_high is not None
    ends = (float((stats.channel_low / factor).min()), float((stats.channel_high / factor).max()))
    signed = rules.signed_activations
    return quantizer_of(stats.low, stats.high, signed, "minmax"), quantizer_of(*ends, signed, "minmax")


def _smoothed(plain: Prepared, data: Dataset, step: StaticInt8, rules: FusionRules, report: Progress) -> Prepared:
    """Smooth the inputs of matrix products if the whole graph has less noise for it, on samples not calibrated on."""
    graph, groups = smooth(plain.graph, plain.groups, plain.statistics)
    if not groups:
        return plain
    smoothed = _cut(graph, rules, plain.changed | dict.fromkeys(groups, "smoothed"), plain.statistics)
    half = max(1, data.size // 2)
    fitted = data.take(spread(half, TRIAL_CALIBRATION))
    held_out = sample_batch(data.take(np.arange(min(half, data.size - 1), data.size)), TRIAL_SAMPLES)
    quick = step.model_copy(update={"reconstruct": False, "ranges": ("minmax",)})
    noise: list[float] = []
    for number, variant in enumerate((plain, smoothed)):
        report("smoothing", number / 2)
        trial = replace(variant, statistics=calibrate(variant.executor, fitted, variant.tensors))
        walk = _walk(trial, trial.groups, fitted, quick, rules, {}, TRIAL_SAMPLES)
        walk.run(silent)
        written = write_qdq(walk.graph, walk.groups, walk.weights, walk.quantizers, rules)
        names = list(variant.executor.outputs)
        outputs = session_of(written, optimise=True).run(names, held_out)
        exact = variant.executor.run_from(0, held_out)
        noise.append(sum(noise_share(exact[n], np.asarray(o)) for n, o in zip(names, outputs, strict=True)))
    if noise[1] >= noise[0]:
        return plain
    new = smoothed.tensors - smoothed.statistics.keys()
    smoothed.statistics |= calibrate(smoothed.executor, data, new, lambda n: report("ranges", n / data.size))
    return smoothed


def _walk(
    prepared: Prepared,
    groups: list[Group],
    data: Dataset,
    step: StaticInt8,
    rules: FusionRules,
    known: dict[str, Quantizer],
    most: int,
) -> Walk:
    return Walk(
        graph=prepared.graph,
        every=prepared.every,
        groups=groups,
        executor=prepared.executor,
        statistics={name: prepared.statistics[name] for name in rounded_tensors(prepared.graph, groups, rules)},
        step=step,
        rules=rules,
        feeds=walk_samples(prepared.executor, data, most),
        changed=prepared.changed,
        known=known,
    )
