"""Rules about operators that could be fewer: branches, batch normalisation, parallel layers, elementwise chains."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from narrowcast.accounting.advice.context import Context
from narrowcast.accounting.advice.items import Advice, Gain, counted, source_of
from narrowcast.accounting.advice.rewriting import convolution, is_batch_norm, resized, widths
from narrowcast.accounting.classes import class_of
from narrowcast.accounting.counting import Work
from narrowcast.accounting.efficiencies import RuntimeModel, runtime_model
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["batch_norm", "branches", "copies", "elementwise", "fragmentation", "parallel"]

#: Seconds below which a wait is a rounding error.
WAIT = 1e-12
_ADDS = frozenset({"add", "add_", "Add", "Sum"})
_COPIES = frozenset({"clone", "contiguous", "cat", "stack", "copy_", "Concat", "Transpose"})
_NUMBERED = re.compile(r".*?(?:^|\.)\d+(?:\.\d+)*(?=\.|$)")
_CONVOLUTIONS = (Kind.CONVOLUTION, Kind.DEPTHWISE)


# Branches -------------------------------------------------------------------------------------------------------------


class _Branch(NamedTuple):
    """A summand that is linear in the block's input: convolution, normalisation, either, or neither."""

    places: tuple[int, ...]
    convolution: int | None
    reads: int
    shape: tuple[int, ...]


class _Sum(NamedTuple):
    """A sum of branches with one input."""

    place: int  # the last addition
    branches: tuple[_Branch, ...]
    adds: tuple[int, ...]

    @property
    def convolutions(self) -> list[int]:
        return [branch.convolution for branch in self.branches if branch.convolution is not None]


def _sums(context: Context) -> Iterator[_Sum]:
    """Yield the sums that one convolution can compute."""
    for place, operator in enumerate(context.operators):
        if operator.name not in _ADDS or operator.phase != "forward":
            continue
        reader = context.only_reader(place)
        if reader is not None and context.operators[reader].name in _ADDS:
            continue  # part of a longer sum
        adds: list[int] = []
        found = tuple(_branches(context, place, adds))
        convolutions = [context.operators[b.convolution].attributes for b in found if b.convolution is not None]
        if len(found) < 2 or not convolutions or len({(b.reads, b.shape) for b in found}) > 1:
            continue
        if found[0].reads in context.sliced or any(item["transposed"] for item in convolutions):
            continue
        alike = {(item["stride"], item["dilation"], item["groups"]) for item in convolutions}
        if len(alike) == 1 and {*convolutions[0]["dilation"]} == {1}:
            yield _Sum(place, found, tuple(adds))


def _branches(context: Context, place: int, adds: list[int]) -> Iterator[_Branch]:
    """Yield the summands of an addition, those of additions before it included."""
    adds.append(place)
    operator = context.operators[place]
    for producer, shape in zip(operator.producers, operator.inputs, strict=False):
        alone = producer >= 0 and context.only_reader(producer) is not None
        if alone and context.operators[producer].name in _ADDS:
            yield from _branches(context, producer, adds)
        else:
            yield _branch(context, producer, shape) if alone else _Branch((), None, producer, shape)


def _branch(context: Context, place: int, shape: tuple[int, ...]) -> _Branch:
    places: list[int] = []
    if is_batch_norm(context.operators[place]):
        places.append(place)
        shape = context.operators[place].inputs[0]
        place = context.source(place)
        if place < 0 or context.only_reader(place) is None:
            return _Branch(tuple(places), None, place, shape)
    operator = context.operators[place]
    if operator.kind in _CONVOLUTIONS:
        return _Branch((*places, place), place, context.source(place), operator.inputs[0])
    return _Branch(tuple(places), None, place, shape)


def branches(context: Context) -> Iterator[Advice]:
    """Yield parallel linear branches that are added: one convolution computes the same."""
    changes: dict[int, tuple[Operator, ...]] = {}
    sums = list(_sums(context))
    for found in sums:
        largest = max(found.convolutions, key=lambda place: math.prod(context.operators[place].attributes["kernel"]))
        changes |= {place: () for branch in found.branches for place in branch.places} | dict.fromkeys(found.adds, ())
        changes[found.place] = (convolution(context.operators[largest], bias=True),)
    if changes:
        summands = sum(len(found.branches) for found in sums)
        yield Advice(
            rule="branches",
            title="Merge branches that are added into one convolution",
            seen=f"{counted(len(sums), 'sum')} of {summands} branches (convolutions, normalisations and shortcuts "
            f"of one input, nothing nonlinear before the sum) take {context.share(changes):.0%} of the time",
            operators=context.paths(place for found in sums for place in found.convolutions),
            gain=context.gain(changes),
            how="re-parameterise after training: fold each normalisation, pad kernels to the largest, add them "
            "(timm.utils.reparameterize_model does it for timm's models), then export that model",
            source=source_of("branches"),
            limits="train with the branches, run without; check low precision after merging, because merged weights "
            "have wider ranges",
            effort="exact",
        )


def batch_norm(context: Context) -> Iterator[Advice]:
    """Yield batch normalisations that fold into the convolution or product before them."""
    if context.compiled:
        return
    merged = {place for found in _sums(context) for branch in found.branches for place in branch.places}
    changes: dict[int, tuple[Operator, ...]] = {}
    for place, operator in enumerate(context.operators):
        if not is_batch_norm(operator) or place in merged or context.profile.mode != "infer":
            continue
        source = context.source(place)
        if source < 0 or context.only_reader(source) is None:
            continue
        before = context.operators[source]
        if before.weight_bytes and before.kind in (*_CONVOLUTIONS, Kind.PRODUCT):
            changes[place] = ()
    if changes:
        yield Advice(
            rule="batch-norm",
            title="Fold batch normalisation into the layers before it",
            seen=f"{counted(len(changes), 'normalisation')} right after a layer with weights: {context.share(changes):.0%} of "
            "the time",
            operators=context.paths(changes),
            gain=context.gain(changes),
            how="torch.nn.utils.fusion.fuse_conv_bn_eval, or export: ONNX Runtime, OpenVINO and TensorRT fold on "
            "loading, and narrowcast optimize works on the folded graph",
            source=source_of("batch-norm"),
            limits="a gain only where the model runs as it is written, as in PyTorch without compilation; for inference "
            "only",
            effort="exact",
        )


# Parallel layers ------------------------------------------------------------------------------------------------------


def parallel(context: Context) -> Iterator[Advice]:
    """Yield layers that read the same and are alike: one wider layer computes them all."""
    merged = {place for found in _sums(context) for branch in found.branches for place in branch.places}
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, operator in enumerate(context.operators):
        source, size = context.source(place), widths(operator)
        if size is None or source < 0 or source in context.sliced or place in merged or operator.phase != "forward":
            continue
        attributes = operator.attributes
        form = tuple(attributes.get(key) for key in ("kernel", "stride", "dilation"))
        rows = (operator.outputs[0][0], *operator.outputs[0][2:]) if attributes else operator.outputs[0][:-1]
        biased = bool(operator.work and operator.work.bias_adds)
        alike.setdefault((source, operator.kind, size[0], form, rows, biased), []).append(place)
    groups = [places for places in alike.values() if len(places) > 1]
    changes: dict[int, tuple[Operator, ...]] = {}
    for first, *others in groups:
        sizes = [size for place in (first, *others) if (size := widths(context.operators[place]))]
        changes[first] = (resized(context.operators[first], sizes[0][0], sum(outputs for _, outputs in sizes)),)
        changes |= dict.fromkeys(others, ())
    if changes:
        yield Advice(
            rule="parallel",
            title="Merge parallel layers that read the same",
            seen=f"{len(changes)} layers in {counted(len(groups), 'group')} read one input each and differ only in "
            f"their weights; they take {context.share(changes):.0%} of the time",
            operators=context.paths(changes),
            gain=context.gain(changes),
            how="concatenate their weights into one layer and take its outputs apart (queries, keys and values; gate "
            "and up projections; 1x1 convolutions of one block)",
            source=source_of("parallel"),
            limits="the parts must be read without copies; layers that are sharded over devices stay apart",
            effort="exact",
        )


# Many small operators -------------------------------------------------------------------------------------------------


def fragmentation(context: Context) -> Iterator[Advice]:
    """Yield the time that a device waits for its host to start small kernels."""
    if context.compiled:
        return
    model = runtime_model(context.device.kind, context.runtime)
    waiting = {
        time.operator: wait
        for time in context.times
        if time.seconds and (wait := time.overhead - _fixed(model, context.operators[time.operator])) > WAIT
    }
    if not model.asynchronous or not waiting:
        return
    saved = math.fsum(waiting.values())
    whole = context.estimate
    blocks = Counter(_block(context.operators[place].path) for place in waiting)
    worst = ", ".join(f"{name or 'the model itself'} {count}" for name, count in blocks.most_common(3))
    running = sum(time.seconds > 0 for time in context.times)
    yield Advice(
        rule="fragmentation",
        title="Start fewer kernels, or start them all at once",
        seen=f"for {len(waiting)} of {counted(running, 'kernel')} {context.device.title} waits for the host to start them, "
        f"{saved / whole.seconds:.0%} of the time (most in: {worst})",
        operators=context.paths(waiting),
        gain=Gain(seconds=saved, share=saved / whole.seconds, low=0.0, high=saved / whole.seconds),
        how='capture the run as a CUDA graph (torch.compile(mode="reduce-overhead"), TensorRT), or run larger batches; '
        "in the design: fewer branches and fewer, wider layers",
        source=source_of("fragmentation"),
        limits="at most this much: a graph still starts every kernel; shapes must not change between runs",
        effort="exact",
    )


def _fixed(model: RuntimeModel, operator: Operator) -> float:
    """Return the seconds that an operator's kernel takes however small it is, once it has begun."""
    return model.rates(class_of(operator)).fixed_us * 1e-6


def _block(path: str) -> str:
    """Return the first numbered module that a path is in: a block of a network that repeats them."""
    numbered = _NUMBERED.match(path)
    return numbered[0] if numbered else path.partition(".")[0]


def elementwise(context: Context) -> Iterator[Advice]:
    """Yield elementwise operators that could run inside the kernel before them."""
    if context.compiled:
        return
    changes: dict[int, tuple[Operator, ...]] = {}
    heads: dict[int, int] = {}
    for place, operator in enumerate(context.operators):
        if operator.kind is not Kind.ELEMENTWISE or operator.phase != "forward" or operator.work is None:
            continue
        source = max(operator.producers, default=-1)
        if source < 0 or context.only_reader(source) != place or source in context.sliced:
            continue
        head = heads.get(source, source)
        before = changes.get(head, (context.operators[head],))[0]
        if before.kind in (Kind.VIEW, Kind.MOVE) or before.outputs[:1] != operator.outputs[:1] or before.work is None:
            continue
        heads[place] = head
        others = max(operator.bytes_read - context.operators[source].bytes_written, 0)
        work = Work(before.work.macs, before.work.bias_adds, before.work.other + operator.work.other, before.work.sums)
        changes[head] = (replace(before, bytes_read=before.bytes_read + others, work=work),)
        changes[place] = ()
    if heads:
        kinds = (Kind.ELEMENTWISE, Kind.NORMALISATION, Kind.SOFTMAX)
        light = [place for place, operator in enumerate(context.operators) if operator.kind in kinds]
        yield Advice(
            rule="elementwise",
            title="Fuse elementwise operators into the kernels before them",
            seen=f"elementwise operators and normalisations take {context.share(light):.0%} of the time; {len(heads)} of "
            "them pass over memory only to change what was just written",
            operators=context.paths(heads),
            gain=context.gain(changes),
            how="torch.compile, ONNX Runtime or TensorRT fuse many of them; in the design: fewer activations and "
            "shortcuts, and activations that runtimes fuse (ReLU rather than swish)",
            source=source_of("elementwise"),
            limits="what a compiler fuses depends on its version: look at the compiled graph; those that it fuses "
            "already are not counted where the estimate knows them",
            effort="exact",
        )


def copies(context: Context) -> Iterator[Advice]:
    """Yield copies of what was just copied: channel shuffles after concatenations, and the like."""
    changes: dict[int, tuple[Operator, ...]] = {}
    for place, operator in enumerate(context.operators):
        source = max(operator.producers, default=-1)
        if operator.name not in _COPIES or source < 0 or context.only_reader(source) != place:
            continue
        if context.operators[source].name in _COPIES and operator.phase == "forward":
            changes[place] = ()
    if changes:
        yield Advice(
            rule="copies",
            title="Move data once, not twice in a row",
            seen=f"{len(changes)} times a copy reads what another copy has just written (a shuffle or transposition after "
            f"a concatenation): {context.share(changes):.0%} of the time",
            operators=context.paths(changes),
            gain=context.gain(changes),
            how="merge them: write to the last place at once, or reorder the next layer's weights instead of the data",
            source=source_of("copies"),
            limits="a compiler (torch.compile, TensorRT) may merge them already",
            effort="exact",
        )
