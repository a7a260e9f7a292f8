"""Profile: what a model costs, as numbers that each mean one thing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from narrowcast.accounting.attention import attentions
from narrowcast.accounting.counting import Work
from narrowcast.accounting.operators import Operator, Trace

if TYPE_CHECKING:
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from narrowcast.accounting.sources import GraphSource, Source

__all__ = ["AttentionCost", "Counted", "Layer", "Parameters", "Part", "Profile", "profile", "profile_module"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Parameters(_Frozen):
    """Trainable numbers; a tensor that several modules share counts once.

    Args:
        total: All of them.
        trainable: Those that require gradients; in an ONNX graph, which does not say, those that are no integer codes.
        active: Those that one token meets; fewer than ``total`` in mixtures of experts.
        by_kind: By the class of the module that owns them (the first, if several do); by operator type in ONNX graphs.
        tied: Names of tensors that are another's under a second name.
        bytes: In the dtypes that the model was built with, or is stored in.
        dtype: What all floating ones of a module are in, such as ``float16``; empty if they differ, and for ONNX graphs.
    """

    total: int
    trainable: int
    active: int
    by_kind: dict[str, int]
    tied: dict[str, str]
    bytes: int
    dtype: str = ""


class Part(_Frozen):
    """What one module (everything inside it) costs; in training with its share of the backward pass.

    Args:
        path: Its name in the model; empty for the whole.
        kind: Its class; empty where an ONNX graph does not say it.
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


class AttentionCost(_Frozen):
    """What attention costs in one forward run, under both conventions; part of the model's MACs, fused or written out.

    Args:
        calls: How often attention ran.
        macs: Of scores and weighted sums of values, for all pairs of query and key, as dense kernels compute.
        causal_macs: Without the pairs that masks hide (causal, sliding-window, block), as kernels compute that skip them.
        masked: Calls in which a mask hides pairs.
        unknown: Calls whose mask depends on inputs or weights; they count as if it hid nothing.
    """

    calls: int
    macs: int
    causal_macs: int
    masked: int
    unknown: int

    @property
    def hidden_macs(self) -> int:
        """What the two conventions differ by."""
        return self.macs - self.causal_macs


class Profile(_Frozen):
    """What a model costs for one run on the given inputs.

    Args:
        model: As the user gave it.
        inputs: Shapes of the inputs.
        input_names: Their names, in the same order.
        mode: ``infer`` or ``train``.
        parameters: Trainable numbers.
        macs: Multiply-accumulates.
        flops: ``2 * macs``; biases and other operations are not part of it.
        bias_adds: Additions of biases.
        other_flops: Elementwise operations, normalisation, softmax and the like.
        additions: Additions in all sums, biases included: ``macs - sums + bias_adds``.
        attention: The share of attention, with all pairs (as in ``macs``) and without those that masks hide.
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
    input_names: list[str]
    mode: str
    parameters: Parameters
    macs: int
    flops: int
    bias_adds: int
    other_flops: int
    additions: int
    attention: AttentionCost
    bytes_moved: int
    static_bytes: int
    peak_bytes: int
    parts: list[Part]
    by_operator: dict[str, tuple[int, int]]
    uncounted: dict[str, int]
    operators: tuple[Operator, ...] = Field(default=(), exclude=True, repr=False)


class Layer(NamedTuple):
    """A module of a model.

    Args:
        path: Its name in the model; empty for the whole.
        kind: Its class.
        parameters: Of it and of what is inside, each tensor once.
    """

    path: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class Counted:
    """What a walker found: all that a profile is made of.

    Args:
        inputs: Shapes of the inputs by name.
        run: The operators.
        parameters: Trainable numbers.
        layers: Every module, parents before children.
    """

    inputs: Mapping[str, Sequence[int]]
    run: Trace
    parameters: Parameters
    layers: Sequence[Layer]


def profile(source: Source | GraphSource, *, train: bool = False) -> Profile:
    """Return what a model costs, counted without building its weights.

    Args:
        source: The model and its inputs, as :func:`narrowcast.accounting.sources.source` gives them.
        train: Whether to count forward and backward, else one inference.

    Raises:
        ModelError: The inputs do not fit, the run depends on numbers, or a graph leaves shapes open or cannot be trained.
    """
    return _profile(source.name, source.count(train=train), train=train)


def profile_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    mode: FakeTensorMode | None = None,
    train: bool = False,
) -> Profile:
    """Return what one run of a module costs; takes what :func:`narrowcast.accounting.trace.trace` takes."""
    from narrowcast.accounting.modules import count_module

    found = count_module(module, args, kwargs, mode=mode, train=train)
    return _profile(name or type(module).__name__, found, train=train)


def _profile(name: str, found: Counted, *, train: bool) -> Profile:
    run = found.run
    by_operator: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for operator in run.operators:
        if operator.work is not None:
            by_operator[operator.name][0] += operator.work.macs
        by_operator[operator.name][1] += 1
    return Profile(
        model=name,
        inputs=[list(shape) for shape in found.inputs.values()],
        input_names=list(found.inputs),
        mode="train" if train else "infer",
        parameters=found.parameters,
        macs=run.macs,
        flops=2 * run.macs,
        bias_adds=run.bias_adds,
        other_flops=run.other,
        additions=run.macs - run.sums + run.bias_adds,
        attention=_attention(run),
        bytes_moved=sum(operator.bytes_read + operator.bytes_written for operator in run.operators),
        static_bytes=run.static_bytes,
        peak_bytes=run.peak_bytes,
        parts=list(_parts(found.layers, run)),
        by_operator={key: (value[0], value[1]) for key, value in sorted(by_operator.items(), key=_most_macs)},
        uncounted=dict(run.uncounted),
        operators=tuple(run.operators),
    )


def _attention(run: Trace) -> AttentionCost:
    found = list(attentions(run.operators))
    return AttentionCost(
        calls=len(found),
        macs=sum(one.macs for one in found),
        causal_macs=sum(one.visible_macs for one in found),
        masked=sum(one.visible_macs < one.macs for one in found),
        unknown=sum(not one.known for one in found),
    )


def _most_macs(item: tuple[str, list[int]]) -> tuple[int, int]:
    return -item[1][0], -item[1][1]


def _parts(layers: Sequence[Layer], run: Trace) -> Iterator[Part]:
    work: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for operator in run.operators:
        names = operator.path.split(".") if operator.path else []
        computed = operator.work or Work()
        moved = operator.bytes_read + operator.bytes_written
        row = (computed.macs, computed.bias_adds, computed.other, moved, int(moved > 0))
        for depth in range(len(names) + 1):
            total = work[".".join(names[:depth])]
            for place, value in enumerate(row):
                total[place] += value
    for path, kind, parameters in layers:
        macs, bias_adds, other, moved, count = work[path]
        yield Part(
            path=path,
            kind=kind,
            parameters=parameters,
            macs=macs,
            bias_adds=bias_adds,
            other_flops=other,
            bytes_moved=moved,
            operators=count,
        )
