"""The walk through a graph that settles its quantisation operator after operator.

At each operator it knows two values of every tensor for a fixed set of samples: the exact one, and the one that the
quantised graph has at that point. Weights are rounded, biases corrected and ranges chosen so that the second stays close
to the first, with all errors made so far already in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrowcast.data.dataset import Tensors
from narrowcast.models.execution import StagedExecutor
from narrowcast.models.graph import Graph
from narrowcast.recipes.plan import OperatorPlan, TensorRange
from narrowcast.recipes.recipe import StaticInt8
from narrowcast.recipes.target import FusionRules
from narrowcast.transforms.groups import Group, root_of
from narrowcast.transforms.insertion import noise_share
from narrowcast.transforms.operators import Operators, add_to_channels, mean_error
from narrowcast.transforms.qdq import QuantizedWeight
from narrowcast.transforms.ranges import METHODS, Quantizer, TensorStatistics, quantizer_of
from narrowcast.transforms.rounding import (
    LARGEST_K,
    Moments,
    WeightLayout,
    channel_scales,
    patches,
    quantise_weight,
    reconstruct,
)

__all__ = ["Progress", "Walk", "silent", "sqnr_db"]

Array = NDArray[Any]
Progress = Callable[[str, float], None]

#: Samples on which a tensor's range is judged by the error that it causes at the outputs of the model.
JUDGE_SAMPLES = 3
#: A range other than the first must bring the error below this share of the first one's.
WORTHWHILE = 0.97
#: Tensors whose values before and after are kept for the report.
WORST_SHOWN = 6


@dataclass
class Walk:
    """One walk through a graph; afterwards ``weights`` and ``quantizers`` are settled.

    Attributes:
        graph: The FP32 graph.
        every: All groups of the graph.
        groups: Those that will compute in integers.
        executor: The graph, cut at the groups.
        statistics: Statistics of the tensors that get a quantizer; without any, weights alone are rounded.
        step: What to do.
        rules: What the target runtime fuses.
        feeds: The samples that the walk looks at.
        changed: Names of tensors and groups that a remedy changed, with the name of the remedy.
        known: Quantizers that were settled by an earlier walk through the same graph.
        weights: Codes of each linear group, by group name.
        quantizers: Quantizer of each tensor.
    """

    graph: Graph
    every: list[Group]
    groups: list[Group]
    executor: StagedExecutor
    statistics: dict[str, TensorStatistics]
    step: StaticInt8
    rules: FusionRules
    feeds: Tensors
    changed: dict[str, str]
    known: dict[str, Quantizer] = field(default_factory=dict)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    sqnr: dict[str, float] = field(default_factory=dict)
    tensor_sqnr: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, tuple[list[float], list[int], list[int]]] = field(default_factory=dict)

    def run(self, report: Progress) -> None:
        """Walk through the stages once, settling each group as it comes."""
        self.by_stage = {group.name: group for group in self.groups}
        self.runner = Operators(self.graph)
        self.producers = self.graph.producers()
        few = {name: value[:JUDGE_SAMPLES] if value.ndim else value for name, value in self.feeds.items()}
        self.reference = self.executor.run_from(0, few)
        exact, quantised = dict(self.feeds), dict(self.feeds)
        for name in self.feeds:
            self._settle_range(name, 0, exact, quantised, few)
        stages = self.executor.stages
        for index, stage in enumerate(stages):
            group = self.by_stage.get(stage.name)
            exact |= self.executor.run_stage(index, exact)
            few |= self.executor.run_stage(index, few)
            if group is None:
                quantised |= self.executor.run_stage(index, quantised)
            else:
                quantised[group.output] = self._run_group(group, exact, quantised)
                self.sqnr[group.name] = sqnr_db(exact[group.output], quantised[group.output])
            for name in stage.outputs:
                self._settle_range(name, index + 1, exact, quantised, few)
            for alive in (exact, quantised, few):
                self.executor.free(index, alive)
            report("operators", (index + 1) / len(stages))

    # Operators ----------------------------------------------------------------------------------------------------

    def _input(self, tensor: str, quantised: Tensors) -> Array:
        """Return a tensor as the kernel reads it."""
        quantizer = self.quantizers.get(root_of(tensor, self.producers, self.rules))
        return quantised[tensor] if quantizer is None else quantizer.apply(quantised[tensor])

    def _run_group(self, group: Group, exact: Tensors, quantised: Tensors) -> Array:
        feeds = {name: self._input(name, quantised) for name in group.inputs}
        if group.kind != "linear":
            return self.runner.run(group, feeds)
        weight = self._round_weight(group, exact, feeds[group.inputs[0]])
        raw = self.runner.before_activation(group, feeds, weight.dequantise())
        if self.step.bias_correction:
            full = self.runner.before_activation(group, {name: exact[name] for name in group.inputs})
            shift = mean_error(group, full, raw)
            bias = weight.bias if weight.bias is not None else np.zeros(len(shift), np.float32)
            weight = replace(weight, bias=bias + shift, remedies=(*weight.remedies, "bias corrected"))
            raw = add_to_channels(group, raw, shift)
        self.weights[group.name] = weight
        return self.runner.activate(group, raw)

    def _round_weight(self, group: Group, exact: Tensors, seen: Array) -> QuantizedWeight:
        node = self.runner.nodes[group.name]
        weight = self.graph.constants[group.weight or ""]
        layout = WeightLayout.of(node, weight)
        matrix = layout.to_matrix(weight)
        if self.step.reconstruct and matrix.shape[-1] <= LARGEST_K:
            moments = Moments.of(patches(node, layout, exact[group.inputs[0]]), patches(node, layout, seen))
            codes, scale = reconstruct(matrix, moments)
            remedies: tuple[str, ...] = ("weights reconstructed",)
        else:
            remedies = ()
            scale = channel_scales(matrix)
            codes = quantise_weight(matrix, scale)
        bias = self.graph.constants[group.bias].astype(np.float32) if group.bias else None
        return QuantizedWeight(layout.from_matrix(codes), scale.reshape(-1), layout.axis, bias, remedies)

    # Ranges -------------------------------------------------------------------------------------------------------

    def _settle_range(self, tensor: str, stage: int, exact: Tensors, quantised: Tensors, few: Tensors) -> None:
        if tensor not in self.statistics:
            return
        chosen = self.known.get(tensor)
        if chosen is None:
            candidates = self._candidates(tensor)
            alone = len(candidates) == 1
            chosen = candidates[0] if alone else self._judge(tensor, stage, candidates, self._few_of(quantised, few))
        self.quantizers[tensor] = chosen
        seen = chosen.apply(quantised[tensor])
        self.tensor_sqnr[tensor] = sqnr_db(exact[tensor], seen)
        self._keep_histogram(tensor, exact[tensor], seen)

    def _keep_histogram(self, tensor: str, exact: Array, seen: Array) -> None:
        """Keep before and after of the tensors with the lowest SQNR so far."""
        edges = np.linspace(min(exact.min(), seen.min()), max(exact.max(), seen.max()) + 1e-12, 61)
        counts = [np.histogram(values.reshape(-1)[:100_000], edges)[0].tolist() for values in (exact, seen)]
        self.histograms[tensor] = (edges.tolist(), counts[0], counts[1])
        if len(self.histograms) > WORST_SHOWN:
            del self.histograms[max(self.histograms, key=lambda name: self.tensor_sqnr[name])]

    def _candidates(self, tensor: str) -> list[Quantizer]:
        """Return one quantizer per method, those that differ by less than a percent in both ends left out."""
        found: list[Quantizer] = []
        for method in self.step.ranges:
            low, high = METHODS[method](self.statistics[tensor])
            made = quantizer_of(low, high, self.rules.signed_activations, method)
            slack = 0.01 * (made.high - made.low)
            if not any(abs(made.low - q.low) <= slack and abs(made.high - q.high) <= slack for q in found):
                found.append(made)
        return found

    def _judge(self, tensor: str, stage: int, candidates: list[Quantizer], few: Tensors) -> Quantizer:
        """Return the candidate with which the model's outputs stay closest, all earlier errors included.

        Judged alone, ranges that clip look better than they are: rounding errors of many tensors average out, but clipping
        errors all point inwards and add up. So the rest of the graph runs on what the quantised graph has at this point.
        """
        moved = [name for name in few if root_of(name, self.producers, self.rules) == tensor]
        errors: list[float] = []
        for candidate in candidates:
            outputs = self.executor.run_from(stage, few | {name: candidate.apply(few[name]) for name in moved})
            errors.append(sum(noise_share(self.reference[name], outputs[name]) for name in outputs))
        best = int(np.argmin(errors))
        return candidates[best] if errors[best] < WORTHWHILE * errors[0] else candidates[0]

    def _few_of(self, quantised: Tensors, few: Tensors) -> Tensors:
        """Return the quantised graph's tensors for the few samples; what has no axis of samples is taken from these."""
        found = dict(few)
        for name, exact in few.items():
            value = quantised[name]
            if value.dtype.kind == "f" and value.ndim and value[: len(exact)].shape == exact.shape:
                found[name] = value[: len(exact)]
        return found

    # What happened ------------------------------------------------------------------------------------------------

    def operators(self) -> list[OperatorPlan]:
        """Return what happened to each group of the graph, quantised or not."""
        chosen = {group.name for group in self.groups}
        return [self._operator(group, group.name in chosen) for group in self.every]

    def _operator(self, group: Group, quantised: bool) -> OperatorPlan:
        fused = tuple(self.runner.nodes[name].op_type for name in group.nodes[1:])
        remedies: list[str] = []
        if quantised and group.kind == "linear":
            names = (group.name, *group.inputs, group.output)
            remedies += sorted({self.changed[name] for name in names if name in self.changed})
            remedies += self.weights[group.name].remedies
        return OperatorPlan(
            group=group.name,
            op_type=group.op_type,
            fused=fused,
            format="int8" if quantised else "fp32",
            remedies=tuple(remedies),
            sqnr_db=self.sqnr.get(group.name),
        )

    def tensor_ranges(self) -> list[TensorRange]:
        """Return the range of each quantised tensor."""
        return [
            TensorRange(
                tensor=name,
                low=q.low,
                high=q.high,
                scale=q.scale,
                zero_point=q.zero_point,
                method=q.method,
                sqnr_db=self.tensor_sqnr[name],
            )
            for name, q in self.quantizers.items()
        ]


def silent(name: str, share: float) -> None:
    """Do nothing: the progress that nobody looks at."""


def sqnr_db(exact: Array, other: Array) -> float:
    """Return the ratio of signal to quantisation noise in dB; 200 where the two are equal."""
    return float(-10 * np.log10(max(noise_share(exact, other), 1e-20)))
