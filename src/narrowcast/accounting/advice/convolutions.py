"""Rules about convolutions: groups, depthwise ones, early layers, and large kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from narrowcast.accounting.advice.context import Context
from narrowcast.accounting.advice.items import Advice, counted, source_of
from narrowcast.accounting.advice.rewriting import Changes, convolution, is_batch_norm, resized
from narrowcast.accounting.advice.widths import IMAGE_CHANNELS
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["dense_3x3", "depthwise", "early_layers", "groups"]

#: A patchified stem reads patches of this many pixels; smaller images than this many would lose too much by it.
PATCH = 4
LEAST_IMAGE = 128


def groups(context: Context) -> Iterator[Advice]:
    """Yield group convolutions that would be faster with one group, fewer channels and the same MACs."""
    changes: dict[int, tuple[Operator, ...]] = {}
    counts: set[int] = set()
    for place, operator in enumerate(context.operators):
        attributes = operator.attributes
        number = attributes.get("groups", 1)
        if operator.kind is not Kind.CONVOLUTION or number == 1 or attributes["transposed"] or operator.work is None:
            continue
        narrower = math.sqrt(number)
        inputs, outputs = (max(round(attributes[side] / narrower), 1) for side in ("inputs", "outputs"))
        one = convolution(operator, inputs=inputs, outputs=outputs, groups=1)
        assert one.work is not None
        changes[place] = (resized(one, inputs, outputs, macs=operator.work.macs),)
        counts.add(number)
    if changes:
        numbers = ", ".join(map(str, sorted(counts)))
        yield Advice(
            rule="groups",
            title="Use fewer groups in group convolutions",
            seen=f"{counted(len(changes), 'convolution')} with {numbers} groups: {_macs(context, changes):.0%} of the MACs and "
            f"{context.share(changes):.0%} of the time",
            operators=context.paths(changes),
            gain=context.gain(changes),
            how="replace groups by fewer channels at the same MACs (channels divided by the root of the groups), or use "
            "wider groups; train again",
            source=source_of("groups"),
            limits="many channels at few MACs are what groups are for: narrower layers may cost accuracy",
            effort="retrain",
        )


def _depthwise_reason(context: Context) -> str:
    title = context.device.title
    if context.compiled:
        return f"they leave most of the units of {title} idle, so more MACs in dense operators are faster"
    return f"{title} waits for their bytes, so more MACs in fewer operators are faster"


def _macs(context: Context, places: Changes) -> float:
    done = sum(work.macs for place in places if (work := context.operators[place].work))
    return done / max(context.profile.macs, 1)


def depthwise(context: Context) -> Iterator[Advice]:
    """Yield depthwise convolutions that are slower than one dense convolution in place of them and their neighbour."""
    if context.device.kind == "cpu":  # where they are the better choice
        return
    changes: dict[int, tuple[Operator, ...]] = {}
    kept: list[int] = []
    for place, operator in enumerate(context.operators):
        if operator.kind is not Kind.DEPTHWISE or operator.phase != "forward" or operator.attributes["transposed"]:
            continue
        dense = _expanded(context, place) or _projected(context, place)
        if dense and not changes.keys() & dense.keys() and context.runs_faster(dense):
            changes |= dense
            kept.append(place)
    if kept:
        yield Advice(
            rule="depthwise",
            title="Replace early depthwise convolutions by dense ones",
            seen=f"{counted(len(kept), 'depthwise convolution')}, with the pointwise ones beside them, take "
            f"{context.share(changes):.0%} of the time for {_macs(context, changes):.0%} of the MACs: "
            + _depthwise_reason(context),
            operators=context.paths(kept),
            gain=context.gain(changes),
            how="merge the expansion and the depthwise convolution of these blocks into one dense convolution of the "
            "same kernel (Fused-MBConv), keep the others, and train again",
            source=source_of("depthwise"),
            limits="holds for this device, and not for CPUs, which run depthwise convolutions well; parameters and MACs grow",
            effort="retrain",
        )


def _expanded(context: Context, place: int) -> dict[int, tuple[Operator, ...]] | None:
    """Return the block with a pointwise convolution before the depthwise one and it as one dense convolution."""
    dropped: list[int] = []
    before = context.source(place)
    while before >= 0 and _passes(context.operators[before]) and context.only_reader(before) is not None:
        dropped.append(before)
        before = context.source(before)
    if before < 0 or not _pointwise(context.operators[before]) or context.only_reader(before) is None:
        return None
    read = context.operators[before].inputs[0]
    dense = convolution(context.operators[place], inputs=read[1], groups=1)
    dense = _reading(dense, context.operators[before].producers)
    return {place: (dense,), before: (), **dict.fromkeys(dropped, ())}


def _projected(context: Context, place: int) -> dict[int, tuple[Operator, ...]] | None:
    """Return the block with the pointwise convolution after the depthwise one and it as one dense convolution."""
    dropped: list[int] = []
    after = context.only_reader(place)
    while after is not None and _passes(context.operators[after]):
        dropped.append(after)
        after = context.only_reader(after)
    if after is None or not _pointwise(context.operators[after]):
        return None
    dense = convolution(context.operators[place], outputs=context.operators[after].attributes["outputs"], groups=1)
    return {place: (), after: (_reading(dense, context.operators[place].producers),), **dict.fromkeys(dropped, ())}


def _reading(operator: Operator, producers: tuple[int, ...]) -> Operator:
    return replace(operator, producers=(*producers[:1], *operator.producers[1:]))


def _pointwise(operator: Operator) -> bool:
    attributes = operator.attributes
    return (
        operator.kind is Kind.CONVOLUTION
        and attributes["groups"] == 1
        and math.prod((*attributes["kernel"], *attributes["stride"])) == 1
    )


def _passes(operator: Operator) -> bool:
    """Return whether an operator changes values one by one: normalisation by fixed numbers, or an activation."""
    alone = sum(producer >= 0 for producer in operator.producers) == 1
    return alone and (operator.kind is Kind.ELEMENTWISE or is_batch_norm(operator))


def early_layers(context: Context) -> Iterator[Advice]:
    """Yield the layers before a quarter of the image's resolution, if one patchifying convolution is faster."""
    stem = next((place for place, operator in enumerate(context.operators) if _reads_image(operator)), None)
    if stem is None:
        return
    first = context.operators[stem]
    quarter = tuple(size // PATCH for size in first.inputs[0][2:])
    end = next((place for place in range(stem, len(context.operators)) if _small(context, place, quarter)), None)
    if (
        end is None
        or end == stem
        or any(_large(context, place, quarter) for place in range(end, len(context.operators)))
    ):
        return
    patches = convolution(
        first,
        outputs=context.operators[end].outputs[0][1],
        kernel=(PATCH, PATCH),
        stride=(PATCH, PATCH),
        positions=quarter,
        bias=True,
    )
    early = [place for place in range(end + 1) if context.operators[place].kind is not Kind.VIEW]
    changes: Changes = {place: (patches,) if place == end else () for place in early}
    yield Advice(
        rule="early-layers",
        title="Start with patches instead of small early layers",
        seen=f"{counted(sum(context.times[place].seconds > 0 for place in early), 'operator')} above a quarter of the "
        f"image's resolution: {context.share(early):.0%} of the time for {_macs(context, changes):.0%} of the MACs",
        operators=context.paths(place for place in early if (work := context.operators[place].work) and work.macs),
        gain=context.gain(changes),
        how=f"replace them by one convolution of {PATCH}x{PATCH} with stride {PATCH} and "
        f"{patches.attributes['outputs']} outputs, and train again; a smaller input image helps likewise",
        source=source_of("early-layers"),
        limits="an upper bound: the replaced layers also do work that later ones may miss, so move blocks to lower "
        "resolutions rather than lose them; not for dense prediction or small images",
        effort="retrain",
    )


def _reads_image(operator: Operator) -> bool:
    """Return whether an operator is a convolution of the model's own input, a large image."""
    if operator.kind is not Kind.CONVOLUTION or not operator.producers or operator.producers[0] >= 0:
        return False
    _, channels, *sizes = operator.inputs[0]
    return channels <= IMAGE_CHANNELS and len(sizes) == 2 and min(sizes) >= LEAST_IMAGE


def _small(context: Context, place: int, quarter: tuple[int, ...]) -> bool:
    operator = context.operators[place]
    shape = operator.outputs[0] if operator.outputs else ()
    return operator.kind is not Kind.VIEW and len(shape) == 4 and 1 < shape[2] <= quarter[0]


def _large(context: Context, place: int, quarter: tuple[int, ...]) -> bool:
    shape = context.operators[place].outputs[0] if context.operators[place].outputs else ()
    return len(shape) == 4 and shape[2] > quarter[0] and context.operators[place].kind is Kind.CONVOLUTION


def dense_3x3(context: Context) -> Iterator[Advice]:
    """Yield dense convolutions of large kernels that stacked ones of 3x3 would replace."""
    changes: dict[int, tuple[Operator, ...]] = {}
    kernels: set[int] = set()
    for place, operator in enumerate(context.operators):
        attributes = operator.attributes
        if operator.kind is not Kind.CONVOLUTION or len(attributes["kernel"]) != 2 or attributes["groups"] != 1:
            continue
        size, other = attributes["kernel"]
        plain = {*attributes["stride"], *attributes["dilation"]} == {1} and not attributes["transposed"]
        if size != other or size < 5 or size % 2 == 0 or not plain or attributes["inputs"] <= IMAGE_CHANNELS:
            continue
        first = convolution(operator, kernel=(3, 3))
        further = convolution(first, inputs=attributes["outputs"], image=first.outputs[0][2:])
        stacked = (first, *[further] * ((size - 1) // 2 - 1))
        if context.runs_faster({place: stacked}):
            changes[place] = stacked
            kernels.add(size)
    if changes:
        sizes = " and ".join(f"{size}x{size}" for size in sorted(kernels))
        yield Advice(
            rule="dense-3x3",
            title="Stack 3x3 convolutions instead of larger kernels",
            seen=f"{counted(len(changes), 'dense convolution')} of {sizes}: {_macs(context, changes):.0%} of the MACs and "
            f"{context.share(changes):.0%} of the time",
            operators=context.paths(changes),
            gain=context.gain(changes),
            how="replace each by 3x3 convolutions that see as far (two for 5x5, three for 7x7), and train again",
            source=source_of("dense-3x3"),
            limits="more layers to wait for; where kernels for 3x3 use Winograd's method the gain is larger than this",
            effort="retrain",
        )
