"""Rules about channels and features: equal widths, and widths that the device's units like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from narrowcast.accounting.advice.context import Context
from narrowcast.accounting.advice.items import Advice, Gain, Multiple, Slower, counted, multiple_for, source_of
from narrowcast.accounting.advice.rewriting import element_bytes, resized, rewritten, widths
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.operators import Operator

__all__ = ["equal_widths", "multiples"]

#: Colours of an image: a layer that reads no more has no choice of its inputs.
IMAGE_CHANNELS = 4
#: Share of a layer's bytes that equal widths must save for the layer to be named.
WORTH = 0.05


def equal_widths(context: Context) -> Iterator[Advice]:
    """Yield pointwise layers that wait for memory and whose inputs and outputs differ in number."""
    changes: dict[int, tuple[Operator, ...]] = {}
    ratios: list[float] = []
    for place, operator in enumerate(context.operators):
        old = widths(operator)
        if old is None or context.times[place].bound != "memory" or not context.readers.get(place):
            continue
        if math.prod(operator.attributes.get("kernel", (1,))) != 1 or min(old) <= IMAGE_CHANNELS:
            continue
        equal = round(math.sqrt(old[0] * old[1]))
        assert operator.work is not None
        rows = math.prod(operator.outputs[0]) / old[1]
        saved = rows * (sum(old) - 2 * equal) * element_bytes(operator)
        if saved > WORTH * (operator.bytes_read + operator.bytes_written):
            changes[place] = (resized(operator, equal, equal, macs=operator.work.macs),)
            ratios.append(max(old) / min(old))
    if changes:
        spread = f"{min(ratios):.2g}" if min(ratios) == max(ratios) else f"{min(ratios):.2g} to {max(ratios):.2g}"
        yield Advice(
            rule="equal-widths",
            title="Give pointwise layers as many outputs as inputs",
            seen=f"{counted(len(changes), 'memory-bound pointwise layer')}, {spread} times wider on one side than on the "
            f"other: {context.share(changes):.0%} of the time",
            operators=context.paths(changes),
            gain=context.gain(changes),
            how="use a smaller expansion, and spend the MACs on width or depth: the same MACs then move fewer bytes; "
            "train again and compare",
            source=source_of("equal-widths"),
            limits="expansion is there for accuracy, so the gain has a price; layers that wait for arithmetic gain "
            "nothing and are left out",
            effort="retrain",
        )


def multiples(context: Context) -> Iterator[Advice]:
    """Yield layers whose widths the device pads."""
    liked = multiple_for(context.device, context.policy)
    if liked is None:
        return
    up = lambda width: -(-width // liked.multiple) * liked.multiple  # noqa: E731
    padded: dict[int, tuple[Operator, ...]] = {}
    slower: dict[int, float] = {}
    odd: set[int] = set()
    for place, operator in enumerate(context.operators):
        old = widths(operator)
        if old is None or operator.phase != "forward":
            continue
        new = (old[0] if old[0] <= IMAGE_CHANNELS else up(old[0]), up(old[1]))
        if new == old:
            continue
        misfits = {width for width, fit in zip(old, new, strict=True) if width != fit}
        padded[place] = (_padded(operator, resized(operator, *new), stored=liked.stored),)
        slower[place] = _slower(liked, operator, misfits)
        odd |= misfits
    if not padded:
        return
    whole = context.estimate
    as_run = context.estimate_of(rewritten(context.operators, padded), slower=slower)
    wasted = max(as_run.seconds - whole.seconds, 0.0)
    share = wasted / (whole.seconds + wasted)
    layers = "convolution" if all(context.operators[p].kind is Kind.CONVOLUTION for p in padded) else "layer"
    shown = ", ".join(map(str, sorted(odd)[:6])) + (" ..." if len(odd) > 6 else "")
    yield Advice(
        rule="multiples",
        title=f"Make widths multiples of {liked.multiple}",
        seen=f"{counted(len(padded), layers)} with widths ({shown}) that are no multiples of {liked.multiple}: "
        "padded to the next larger ones, or left to slower kernels",
        operators=context.paths(padded),
        gain=Gain(
            seconds=wasted,
            share=share,
            low=min(share, wasted / (whole.high + wasted)),
            high=max(share, wasted / (whole.low + wasted)),
        ),
        how=f"round widths to multiples of {liked.multiple} ({_rounded(odd, liked.multiple)}); outputs of the last "
        "layer may be padded with classes or tokens that never occur",
        source=liked.source,
        limits="counts the padded work, and slower kernels only where somebody measured them for this architecture"
        if liked.slower == Slower()
        else "kernels differ between versions of the libraries; counts with the least of the factors that were measured",
        effort="retrain",
    )


def _padded(operator: Operator, wide: Operator, *, stored: bool) -> Operator:
    """Return a layer as the device computes it: in the padded shape, with the padding in memory only if it is stored."""
    if stored:
        return wide
    return replace(
        wide,
        bytes_read=operator.bytes_read,
        weight_bytes=operator.weight_bytes,
        bytes_written=operator.bytes_written,
    )


def _slower(liked: Multiple, operator: Operator, misfits: set[int]) -> float:
    """Return how many times slower the kernel for such widths is, beyond the padding."""
    if operator.kind is Kind.CONVOLUTION:
        return liked.slower.convolution
    return liked.slower.product_odd if any(width % 2 for width in misfits) else liked.slower.product


def _rounded(odd: set[int], multiple: int) -> str:
    """Return examples of the nearest multiples."""
    near = lambda width: max(multiple, (width + multiple // 2) // multiple * multiple)  # noqa: E731
    return ", ".join(f"{width} to {near(width)}" for width in sorted(odd)[:3])
