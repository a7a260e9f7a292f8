"""Profile: what a model costs, as numbers that each mean one thing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowcast.accounting.counting import Work
from narrowcast.accounting.sources import Source
from narrowcast.accounting.trace import Operator, Trace, fake_module, trace

__all__ = ["Parameters", "Part", "Profile", "profile", "profile_module"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Parameters(_Frozen):
    """Trainable numbers; a tensor that several modules share counts once.

    Args:
        total: All of them.
        trainable: Those that require gradients.
        active: Those that one token meets; fewer than ``total`` in mixtures of experts.
        by_kind: By the class of the module that owns them (the first, if several do).
        tied: Names of tensors that are another's under a second name.
        bytes: In the dtypes that the model was built with.
    """

    total: int
    trainable: int
    active: int
    by_kind: dict[str, int]
    tied: dict[str, str]
    bytes: int


class Part(_Frozen):
    """What one module (everything inside it) costs.

    Args:
        path: Its name in the model; empty for the whole.
        kind: Its class.
        parameters: Of it and of what is inside, each tensor once.
        macs: Multiply-accumulates.
        bias_adds: Additions of biases.
        other_flops: Operations that are no MAC.
        bytes_moved: Bytes read and written by its operators, if each ran alone.
        operators: Operators that are no views.
    """

    path: str
    kind: str
    parameters: int
    macs: int
    bias_adds: int
    other_flops: int
    bytes_moved: int
    operators: int

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that is moved."""
        return (2 * self.macs + self.bias_adds + self.other_flops) / self.bytes_moved if self.bytes_moved else 0.0


class Profile(_Frozen):
    """What a model costs for one run on the given inputs.

    Args:
        model: As the user gave it.
        inputs: Shapes of the inputs.
        mode: ``infer`` or ``train``.
        parameters: Trainable numbers.
        macs: Multiply-accumulates.
        flops: ``2 * macs``; biases and other operations are not part of it.
        bias_adds: Additions of biases.
        other_flops: Elementwise operations, normalisation, softmax and the like.
        additions: Additions in all sums, biases included: ``macs - sums + bias_adds``.
        bytes_moved: Bytes that operators read and write, if each ran alone.
        static_bytes: Bytes of parameters and buffers.
        peak_bytes: Most bytes alive at one moment, parameters included; a kernel's own workspace is not.
        parts: Every module, parents before children.
        by_operator: MACs and calls by operator.
        uncounted: Operators without a rule, and how often they ran.
        operators: Every operator, in the order of the run; no part of the JSON.
    """

    model: str
    inputs: list[list[int]]
    mode: str
    parameters: Parameters
    macs: int
    flops: int
    bias_adds: int
    other_flops: int
    additions: int
    bytes_moved: int
    static_bytes: int
    peak_bytes: int
    parts: list[Part]
    by_operator: dict[str, tuple[int, int]]
    uncounted: dict[str, int]
    operators: tuple[Operator, ...] = Field(default=(), exclude=True, repr=False)


def profile(source: Source, *, train: bool = False) -> Profile:
    """Return what a model costs, counted without building its weights.

    Args:
        source: The model and its inputs.
        train: Whether to count forward and backward, else one inference.

    Raises:
        ModelError: The inputs do not fit, or the run depends on numbers.
    """
    module, mode = fake_module(source.build)
    return profile_module(module, source.examples(), source.named(), name=source.name, mode=mode, train=train)


def profile_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    name: str = "",
    mode: FakeTensorMode | None = None,
    train: bool = False,
) -> Profile:
    """Return what one run of a module costs; takes what :func:`narrowcast.accounting.trace.trace` takes."""
    run = trace(module, args, kwargs, mode=mode, train=train)
    leaves = [value for value in (*args, *(kwargs or {}).values()) if hasattr(value, "shape")]
    by_operator: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for operator in run.operators:
        if operator.work is not None:
            by_operator[operator.name][0] += operator.work.macs
        by_operator[operator.name][1] += 1
    return Profile(
        model=name or type(module).__name__,
        inputs=[list(value.shape) for value in leaves],
        mode="train" if train else "infer",
        parameters=_parameters(module, run),
        macs=run.macs,
        flops=2 * run.macs,
        bias_adds=run.bias_adds,
        other_flops=run.other,
        additions=run.macs - run.sums + run.bias_adds,
        bytes_moved=sum(operator.bytes_read + operator.bytes_written for operator in run.operators),
        static_bytes=run.static_bytes,
        peak_bytes=run.peak_bytes,
        parts=list(_parts(module, run)),
        by_operator={key: (value[0], value[1]) for key, value in sorted(by_operator.items(), key=_most_macs)},
        uncounted=dict(run.uncounted),
        operators=tuple(run.operators),
    )


def _most_macs(item: tuple[str, list[int]]) -> tuple[int, int]:
    return -item[1][0], -item[1][1]


def _parameters(module: nn.Module, run: Trace) -> Parameters:
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    total = trainable = size = 0
    for prefix, part in module.named_modules():
        for key, tensor in part.named_parameters(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{key}".lstrip(".")
            if id(tensor) in first:
                tied[path] = first[id(tensor)]
                continue
            first[id(tensor)] = path
            kinds[type(part).__name__] += tensor.numel()
            total += tensor.numel()
            trainable += tensor.numel() * tensor.requires_grad
            size += tensor.numel() * tensor.element_size()
    return Parameters(
        total=total,
        trainable=trainable,
        active=total - _idle(run),
        by_kind=dict(kinds.most_common()),
        tied=tied,
        bytes=size,
    )


def _idle(run: Trace) -> int:
    """Return the experts' parameters that a token does not meet, from products of rows with one expert's weight each.

    A grouped product of ``rows`` rows with weights ``[experts, k, n]`` uses ``k * n`` weights for each row; routing sends
    each token to ``rows / tokens`` of the experts.
    """
    tokens = next(
        (math.prod(operator.outputs[0][:-1]) for operator in run.operators if operator.name == "embedding"), 0
    )
    idle = 0
    for operator in run.operators:
        if operator.name not in ("_grouped_mm", "_scaled_grouped_mm") or operator.phase != "forward" or not tokens:
            continue
        rows, (experts, *weight) = operator.inputs[0][0], operator.inputs[1]
        idle += (experts - min(rows // tokens, experts)) * math.prod(weight)
    return idle


def _parts(module: nn.Module, run: Trace) -> Iterator[Part]:
    work: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for operator in run.operators:
        if operator.phase != "forward":
            continue
        names = operator.path.split(".") if operator.path else []
        computed = operator.work or Work()
        moved = operator.bytes_read + operator.bytes_written
        row = (computed.macs, computed.bias_adds, computed.other, moved, int(moved > 0))
        for depth in range(len(names) + 1):
            total = work[".".join(names[:depth])]
            for place, value in enumerate(row):
                total[place] += value
    for path, part in module.named_modules():
        macs, bias_adds, other, moved, count = work[path]
        yield Part(
            path=path,
            kind=type(part).__name__,
            parameters=sum(tensor.numel() for tensor in part.parameters()),
            macs=macs,
            bias_adds=bias_adds,
            other_flops=other,
            bytes_moved=moved,
            operators=count,
        )
