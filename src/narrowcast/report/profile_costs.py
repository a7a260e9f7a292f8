"""Everything that was found out about what a model costs, and the rows of numbers that terminal, page and JSON share."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from narrowcast.accounting.devices import Device
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.kv_cache import KVCache
from narrowcast.accounting.operators import Operator
from narrowcast.accounting.policies import Policy
from narrowcast.accounting.profile import Profile
from narrowcast.accounting.roofline import Estimate
from narrowcast.accounting.traffic import traffic
from narrowcast.report import text
from narrowcast.report.profile_tree import Node, fold

if TYPE_CHECKING:
    from narrowcast.accounting.memory import Memory  # needs torch, which graphs are counted without

__all__ = [
    "Costs",
    "Difference",
    "Group",
    "Row",
    "compared",
    "differences",
    "groups",
    "part_name",
    "rows",
    "title",
]

#: Tokens and sequences for which the cache of keys and values is given.
TOKENS = (1024, 4096, 16_384, 65_536, 131_072)
BATCHES = (1, 8, 32, 128)

#: Units whose values are not written with decimal prefixes of their own.
_UNITS = ("bytes", "s", "samples")
_PART_NAMES = {
    "data": "inputs",
    "weights": "weights and buffers",
    "master": "master weights",
    "optimizer_state": "optimizer state",
    "activations": "activations for backward",
    "temporary": "temporary results",
    "kv_cache": "keys and values of past tokens",
}


@dataclass(frozen=True)
class Costs:
    """What one model costs, as far as it was asked for.

    Args:
        profile: What was counted.
        policy: The number formats.
        device: Where it is meant to run.
        estimate: How long it takes there; None without a device.
        memory: The memory that it needs; None where it cannot be followed.
        cache: What a language model keeps of past tokens; None for other models.
        largest_batch: The most samples that the device's memory holds; None unless asked for.
    """

    profile: Profile
    policy: Policy
    device: Device | None = None
    estimate: Estimate | None = None
    memory: Memory | None = None
    cache: KVCache | None = None
    largest_batch: int | None = None
    tree: Node = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Fold the modules once: terminal and page show the same tree."""
        times = None if self.estimate is None else [time.seconds for time in self.estimate.operators]
        moved = [traffic(operator, self.policy).total for operator in self.profile.operators]
        object.__setattr__(self, "tree", fold(self.profile, moved=moved, seconds=times))

    def as_json(self) -> dict[str, Any]:
        """Return everything as values that JSON has; what was not asked for is null."""
        return self.profile.model_dump(mode="json") | {
            "precision": self.policy.name,
            "device": None if self.device is None else self.device.name,
            "estimate": None if self.estimate is None else self.estimate.model_dump(mode="json"),
            "memory": None if self.memory is None else self.memory.model_dump(mode="json", exclude={"timeline"}),
            "largest_batch": self.largest_batch,
            "kv_cache": None if self.cache is None else _cache_as_json(self.cache),
        }


class Row(NamedTuple):
    """One number with its name: what it is called, its value, its unit (may be empty), and what it means."""

    label: str
    value: float
    unit: str = ""
    hint: str = ""

    @property
    def short(self) -> str:
        """The value as people read it."""
        return (
            text.quantity(self.value, self.unit) if self.unit in ("bytes", "s") else text.count(self.value, self.unit)
        )

    @property
    def exact(self) -> str:
        """Every digit of a count; empty for what is no count."""
        return f"{self.value:,}" if isinstance(self.value, int) else ""


def rows(costs: Costs) -> list[Row]:
    """Return the numbers of the whole model, each of which means one thing."""
    found, parameters = costs.profile, costs.profile.parameters
    made = [Row("parameters", parameters.total, hint="tied tensors once")]
    if parameters.trainable != parameters.total:
        made.append(Row("of them trainable", parameters.trainable))
    if parameters.active != parameters.total:
        made.append(Row("met by one token", parameters.active, hint="in a mixture of experts"))
    made += [
        Row("MACs", found.macs, hint="multiplications that are each added to a sum"),
        Row("FLOPs", found.flops, hint="2 × MACs, and nothing else"),
        *_attention(found),
        Row("multiplications", found.macs, hint="in products, convolutions and attention"),
        Row("additions, biases apart", found.additions - found.bias_adds, hint="one less than the terms of each sum"),
        Row("bias additions", found.bias_adds),
        Row("additions, biases included", found.additions),
        Row("other operations", found.other_flops, hint="elementwise, normalisation, softmax, pooling"),
        Row("weights as built", found.static_bytes, "bytes", "parameters and buffers in the constructor's dtypes"),
        Row(
            "bytes moved",
            round(costs.tree.bytes_moved),
            "bytes",
            f"in {costs.policy.name}, if each operator runs alone",
        ),
        Row("arithmetic intensity", costs.tree.intensity, "FLOP/B", "all operations for each byte moved"),
    ]
    if costs.cache is not None:
        made.append(
            Row("cache for each token", costs.cache.per_token, "bytes", f"keys and values in {costs.cache.format.name}")
        )
    if costs.memory is None:
        made.append(Row("peak memory", found.peak_bytes, "bytes", "without what kernels allocate for themselves"))
    else:
        made.append(Row("peak memory", costs.memory.peak, "bytes", f"in {costs.policy.name}, at {costs.memory.when}"))
    if costs.largest_batch is not None and costs.device is not None:
        made.append(
            Row("largest batch", costs.largest_batch, "samples", f"that the memory of {costs.device.name} holds")
        )
    if costs.estimate is not None:
        found = costs.estimate
        made.append(Row("time", found.seconds, "s", f"on {found.device}, estimated"))
        made.append(Row("time, at least", found.low, "s", "the error band's lower end"))
        made.append(Row("time, at most", found.high, "s", "the error band's upper end"))
        made.append(Row("time, by physics", found.floor, "s", "no runtime takes less"))
    return made


class CacheRow(NamedTuple):
    """What a language model keeps of so many tokens.

    Args:
        tokens: Of each sequence.
        bytes: For each of :data:`BATCHES`.
        fit: Sequences that fit beside the weights into the device's memory; None where that is not known.
    """

    tokens: int
    bytes: tuple[int, ...]
    fit: int | None


def cache_rows(costs: Costs) -> list[CacheRow]:
    """Return the cache of keys and values by tokens and batch; nothing for models without one."""
    cache = costs.cache
    if cache is None:
        return []
    room = None
    if costs.device is not None and costs.device.memory.bytes is not None and costs.memory is not None:
        room = max(costs.device.memory.bytes - costs.memory.weights - costs.memory.workspace, 0)
    return [
        CacheRow(
            tokens,
            tuple(cache.bytes(tokens, batch) for batch in BATCHES),
            None if room is None else cache.sequences(tokens, room),
        )
        for tokens in TOKENS
    ]


def _cache_as_json(cache: KVCache) -> dict[str, Any]:
    return {
        "format": cache.format.name,
        "bytes_per_token": cache.per_token,
        "bytes": [
            {"tokens": tokens, "batch": batch, "bytes": cache.bytes(tokens, batch)}
            for tokens in TOKENS
            for batch in BATCHES
        ],
    }


def _attention(found: Profile) -> list[Row]:
    """Return the share of attention under both conventions; of a training step, that of its forward pass."""
    cost = found.attention
    if not cost.calls:
        return []
    made = [Row("attention", cost.macs, "", "MACs of one forward pass, all pairs of tokens")]
    if cost.masked:
        made.append(Row("attention, causal", cost.causal_macs, "", "without the pairs that masks hide"))
        if found.mode == "infer":
            made.append(Row("MACs, causal", found.macs - cost.hidden_macs, "", "without the pairs that masks hide"))
    return made


def part_name(name: str) -> str:
    """Return what memory holds, as people say it."""
    return _PART_NAMES.get(name, name)


def title(costs: Costs) -> str:
    """Return what was counted: the model, its inputs, whether it is trained, in which formats, on which device."""
    found = costs.profile
    shapes = ", ".join("×".join(map(str, shape)) or "1" for shape in found.inputs)
    mode = "training step" if found.mode == "train" else "inference"
    parts = [found.model, shapes, mode, costs.policy.name, costs.device.title if costs.device else ""]
    return " · ".join(part for part in parts if part)


class Difference(NamedTuple):
    """One number of two models: its name, both values as text, the second less the first, and over the first."""

    label: str
    first: str
    second: str
    difference: str
    ratio: str


def compared(first: Costs, second: Costs) -> list[Difference]:
    """Return the numbers of two models side by side; what only one of them has stands alone."""
    left, right = ({row.label: row for row in rows(costs)} for costs in (first, second))
    return [_difference(label, left.get(label), right.get(label)) for label in {**left, **right}]


def differences(first: Costs, second: Costs) -> dict[str, dict[str, float | None]]:
    """Return the numbers that both models have, by name: both values, the second less the first, and over the first."""
    left, right = ({row.label: row.value for row in rows(costs)} for costs in (first, second))
    return {
        label: {
            "first": value,
            "second": right[label],
            "difference": right[label] - value,
            "ratio": right[label] / value if value else None,
        }
        for label, value in left.items()
        if label in right
    }


def _difference(label: str, first: Row | None, second: Row | None) -> Difference:
    if first is None or second is None:
        left, right = (text.MISSING if row is None else row.short for row in (first, second))
        return Difference(label, left, right, text.MISSING, text.MISSING)
    change = Row(label, second.value - first.value, second.unit)
    sign = "+" if change.value > 0 else ""
    ratio = text.ratio(second.value / first.value) if first.value else text.MISSING
    return Difference(label, first.short, second.short, f"{sign}{change.short}".replace("-", "−"), ratio)


# Operators ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Operators that are alike in sort, name, shapes and phase; sums over all of them.

    Args:
        kind: Their sort.
        name: Their ATen or ONNX name.
        where: The module of the first.
        shapes: Of its inputs and of its first output.
        phase: ``forward`` or ``backward``.
        count: How many.
        macs: Multiply-accumulates.
        flops: All floating-point operations.
        bytes: Read and written, in the formats of the policy.
        seconds: Estimated; None without a device.
        bound: What most of their time goes to.
    """

    kind: Kind
    name: str
    where: str
    shapes: str
    phase: str
    count: int
    macs: int
    flops: int
    bytes: float
    seconds: float | None
    bound: str

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte that is moved."""
        return self.flops / self.bytes if self.bytes else 0.0


def groups(costs: Costs) -> list[Group]:
    """Return the operators that are no views, the most expensive first: by time where there is one, else by MACs."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, operator in enumerate(costs.profile.operators):
        if operator.kind is not Kind.VIEW and operator.bytes_read + operator.bytes_written:
            key = (operator.kind, operator.name, operator.inputs, operator.outputs, operator.phase)
            alike[key].append(place)
    found = [_group(costs, places) for places in alike.values()]
    return sorted(found, key=lambda group: (-(group.seconds or 0.0), -group.macs, -group.bytes))


def _group(costs: Costs, places: Sequence[int]) -> Group:
    operators = [costs.profile.operators[place] for place in places]
    first = operators[0]
    seconds, bound = None, ""
    if costs.estimate is not None:
        times = [costs.estimate.operators[place] for place in places]
        seconds = math.fsum(time.seconds for time in times)
        by_bound: dict[str, float] = defaultdict(float)
        for time in times:
            by_bound[time.bound] += time.seconds
        bound = max(by_bound, key=lambda name: by_bound[name])
    return Group(
        kind=first.kind,
        name=first.name,
        where=first.path,
        shapes=_shapes(first),
        phase=first.phase,
        count=len(places),
        macs=sum(operator.work.macs for operator in operators if operator.work),
        flops=sum(2 * work.macs + work.bias_adds + work.other for work in _works(operators)),
        bytes=math.fsum(traffic(operator, costs.policy).total for operator in operators),
        seconds=seconds,
        bound=bound,
    )


def _works(operators: Sequence[Operator]) -> Iterator[Any]:
    return (operator.work for operator in operators if operator.work)


def _shapes(operator: Operator) -> str:
    """Return the shapes of the two inputs that matter most, and of the output: ``1x64x56x56, 64x64x3x3 → 1x64x56x56``."""
    inputs = ", ".join("×".join(map(str, shape)) or "1" for shape in operator.inputs[:2])
    output = "×".join(map(str, operator.outputs[0])) or "1" if operator.outputs else ""
    return f"{inputs} → {output}" if inputs else output
