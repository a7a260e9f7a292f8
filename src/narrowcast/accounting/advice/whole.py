"""Rules about the whole run: precision, memory, batch, and the family of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from narrowcast.accounting.advice.context import Context
from narrowcast.accounting.advice.items import MINIMUM, Advice, Gain, families_for, source_of
from narrowcast.accounting.advice.rewriting import batched
from narrowcast.accounting.advice.widths import IMAGE_CHANNELS
from narrowcast.accounting.devices import Device
from narrowcast.accounting.kinds import Kind
from narrowcast.accounting.policies import POLICIES, Policy, own_policy
from narrowcast.accounting.roofline import Estimate
from narrowcast.errors import DeviceError
from narrowcast.formats.table import get

__all__ = ["batch", "default_policy", "family", "memory", "precision"]

#: A batch is enough when it reaches this share of the best throughput.
ENOUGH = 0.9
#: Two doublings that bring less than this are the end.
FLAT = 1.01
LARGEST_BATCH = 1 << 16
SHOWN_BATCHES = 8
BEST_FAMILIES = 3

_STATIC_INT8 = POLICIES["int8-static"]


class _Candidate(NamedTuple):
    """A precision to advise."""

    policy: Policy
    rule: str  # whose source it quotes
    how: str
    limits: str


_HALF_LIMITS = "measure accuracy; FP16 overflows above 65504; a runtime must have such kernels for this device"
_WEIGHTS_LIMITS = "helps while weights are what the run waits for: small batches of language models; not in prefill"


def _candidates(device: Device) -> Iterator[_Candidate]:
    """Yield narrower precisions that a device multiplies in, the least invasive first."""
    half = next((name for name in ("bf16", "fp16") if device.peak(name)), None)
    if device.peak("tf32"):
        yield _Candidate(
            Policy("tf32", "fp32", "fp32", "tf32", "fp32"),
            "tf32",
            'torch.set_float32_matmul_precision("high"): products round their inputs to 10 bits, all else stays FP32',
            "measure accuracy; 10 bits of mantissa are enough for most networks",
        )
    if half is not None:
        either = "BF16 or FP16" if device.peak("fp16") and half == "bf16" else half.upper()
        yield _Candidate(POLICIES[half], "half", f"run weights and activations in {either}", _HALF_LIMITS)
    if device.peak("fp8") and half is not None:
        member = next(name for name in ("e4m3fn", "e4m3fnuz", "e4m3") if name in device.formats)
        yield _Candidate(
            Policy("fp8", member, half, member, half),
            "fp8",
            "quantise weights and inputs of products to FP8 (E4M3) with scales; narrowcast formats shows the format",
            "measure accuracy; needs scales per tensor or channel, and products whose sizes are multiples of 16",
        )
    if device.peak("int8"):
        yield _Candidate(
            _STATIC_INT8,
            "int8",
            "narrowcast optimize MODEL --data DATA --out FOLDER --max-drop 0.5% finds what may be quantised, measured on "
            "the runtimes of this machine"
            if device.kind == "cpu"
            else "quantise weights and activations with calibration, and measure on the device's own runtime",
            "measure accuracy; assumes that the whole run is in INT8, without conversions in between",
        )
    if half is not None:
        for bits in ("int8", "int4"):
            policy = POLICIES[bits]._replace(rest=half, compute=half, activations=half)
            how = f"store weights in {bits.upper()} with scales per group, multiply in {half.upper()}"
            yield _Candidate(policy, "weight-only", how, _WEIGHTS_LIMITS)


def default_policy(device: Device, dtype: str = "float32") -> Policy:
    """Return the precision that a model needs no change for: its own, or the widest that a device multiplies in.

    Args:
        device: Where it runs.
        dtype: What the model's parameters are in.

    Raises:
        DeviceError: Nobody states how fast the device multiplies in any usual format.
    """
    own = own_policy(dtype)
    if own.name != "fp32" and device.peak(own.compute):
        return own
    known = (*(POLICIES[name] for name in ("fp32", "fp16", "bf16")), _STATIC_INT8)
    found = next((policy for policy in known if device.peak(policy.compute)), None)
    if found is None:
        raise DeviceError(f"nobody states how fast {device.title} multiplies in FP32, FP16, BF16 or INT8")
    return found


def precision(context: Context) -> Iterator[Advice]:
    """Yield narrower precisions, each if it is faster than all less invasive ones by what is worth showing."""
    best = before = context.estimate
    for candidate in _candidates(context.device):
        if _bits(candidate.policy) >= _bits(context.policy):
            continue
        if candidate.rule == "weight-only" and not _mostly_products(context):
            continue
        after = _estimate(context, candidate.policy)
        if after is None or best.seconds - after.seconds < MINIMUM * before.seconds:
            continue
        waits = max(before.shares, key=lambda bound: before.shares[bound])
        yield Advice(
            rule=f"precision-{candidate.policy.name}",
            title=_title(candidate.policy),
            seen=f"{context.device.title} multiplies in {', '.join(_products(context.device))}; in "
            f"{context.policy.name.upper()} {before.shares[waits]:.0%} of the time is spent waiting for "
            f"{_WAITS.get(waits, waits)}",
            gain=Gain(
                seconds=before.seconds - after.seconds,
                share=1 - after.seconds / before.seconds,
                low=max(1 - after.high / before.seconds, 0.0),
                high=1 - after.low / before.seconds,
            ),
            how=candidate.how,
            source=source_of(candidate.rule),
            limits=candidate.limits,
            effort="accuracy",
        )
        best = after


def _mostly_products(context: Context) -> bool:
    """Return whether most weights are those of matrix products: kernels for weights of few bits exist for these alone."""
    products = sum(operator.weight_bytes for operator in context.operators if operator.kind is Kind.PRODUCT)
    return 2 * products > sum(operator.weight_bytes for operator in context.operators)


_WAITS = {"compute": "arithmetic", "memory": "memory", "overhead": "operators to start"}


def _title(policy: Policy) -> str:
    if policy.weight_only and policy.weights != policy.activations:
        return f"Store weights in {policy.weights.upper()} only"
    return "Compute in INT8" if policy is _STATIC_INT8 else f"Compute in {policy.name.upper()}"


def _products(device: Device) -> list[str]:
    return [name.upper() for name in ("fp32", "tf32", "fp16", "bf16", "fp8", "int8") if device.peak(name)]


def _bits(policy: Policy) -> tuple[float, float]:
    """Return the bits of weights and of products, to tell which of two policies is narrower."""
    compute = 19.0 if policy.compute == "tf32" else _width(policy.compute)
    return _width(policy.weights), compute


def _width(format: str) -> float:
    return get(format).bits  # pyright: ignore[reportAttributeAccessIssue]


def _estimate(context: Context, policy: Policy) -> Estimate | None:
    try:
        return context.estimate_of(context.operators, policy)
    except DeviceError:
        return None


# Memory ---------------------------------------------------------------------------------------------------------------


def _needed(context: Context, policy: Policy, times: int = 1) -> float:
    """Return the bytes that weights and activations need at once, with ``times`` the samples."""
    profile = context.profile
    counted = 8 * profile.parameters.bytes / max(profile.parameters.total, 1) or 32.0
    activations = (profile.peak_bytes - profile.static_bytes) * _width(policy.activations) / counted
    return profile.parameters.total * _width(policy.weights) / 8 + times * activations


def memory(context: Context) -> Iterator[Advice]:
    """Yield what must happen to a model that does not fit the device's memory."""
    capacity = context.device.memory.bytes
    needed = _needed(context, context.policy)
    if capacity is None or needed <= capacity:
        return
    narrower = (
        candidate for candidate in _candidates(context.device) if _needed(context, candidate.policy) <= capacity
    )
    fitting = next(narrower, None)
    size = _needed(context, fitting.policy) if fitting else 0.0
    yield Advice(
        rule="memory",
        title=f"It does not fit: {_title(fitting.policy).lower()}" if fitting else "It does not fit this device",
        seen=f"weights and activations in {context.policy.name.upper()} need {needed / 2**30:.1f} GiB, "
        f"{context.device.title} has {capacity / 2**30:g}",
        how=f"{fitting.how}: then {size / 2**30:.1f} GiB are needed"
        if fitting
        else "share it over several devices, use a smaller batch or fewer tokens, or a smaller model",
        source=source_of("memory"),
        limits="the cache of keys and values of further tokens, and what the runtime itself keeps, come on top",
        effort="accuracy" if fitting else "retrain",
        required=True,
    )


# Batch ----------------------------------------------------------------------------------------------------------------


class _Batches(NamedTuple):
    """What larger batches bring.

    Args:
        took: Estimates of one run by how many times the samples it has.
        ended: Why no larger one was looked at: ``flat`` (throughput stopped growing), ``memory`` or ``limit``.
    """

    took: dict[int, Estimate]
    ended: str


def _batches(context: Context, samples: int) -> _Batches:
    """Return estimates of batches twice as large each time, until two doublings in a row bring next to nothing."""
    capacity = context.device.memory.bytes
    took: dict[int, Estimate] = {}
    rates: list[float] = []
    times = 1
    while samples * times <= LARGEST_BATCH:
        if capacity is not None and _needed(context, context.policy, times) > capacity:
            return _Batches(took, "memory")
        took[times] = context.estimate_of([batched(operator, times) for operator in context.operators])
        rates.append(times / took[times].seconds)
        if len(rates) > 2 and max(rates[-2:]) < FLAT * rates[-3]:
            return _Batches(took, "flat")
        times *= 2
    return _Batches(took, "limit")


def batch(context: Context) -> Iterator[Advice]:
    """Yield the batch at which throughput has nearly stopped growing, or the largest that fits, if it is a larger one."""
    samples = context.profile.inputs[0][0] if context.profile.inputs and context.profile.inputs[0] else 1
    took, ended = _batches(context, samples)
    if len(took) < 2:
        return
    rates = {times: samples * times / found.seconds for times, found in took.items()}
    knee = next(times for times, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    if knee == 1:
        return
    now, then = took[1], took[knee]
    share = 1 - then.seconds / knee / now.seconds
    near = [times for times in rates if times <= 2 * knee][-SHOWN_BATCHES:]
    shown = ", ".join(f"{samples * times}: {_rate(rates[times])}" for times in dict.fromkeys((1, *near)))
    yield Advice(
        rule="batch",
        title=f"Run {samples * knee:,} samples at once where requests wait together",
        seen=f"samples per second by batch: {shown}",
        gain=Gain(
            seconds=now.seconds / samples * share,
            share=share,
            low=max(1 - then.high / knee / now.seconds, 0.0),
            high=1 - then.low / knee / now.seconds,
        ),
        how=f"collect up to {samples * knee:,} samples per run; {_beyond(context, knee, samples, took, ended)}",
        source=source_of("batch"),
        limits=f"time per sample, not of one answer: a run then takes {then.seconds / now.seconds:.3g} times as long as "
        "now; not where samples come one by one",
        effort="exact",
    )


def _beyond(context: Context, knee: int, samples: int, took: dict[int, Estimate], ended: str) -> str:
    """Return what larger batches bring."""
    largest = max(took)
    more = f"less than {1 / ENOUGH - 1:.0%} more"
    if ended == "flat":
        return f"larger batches bring {more}"
    why = f"do not fit the memory of {context.device.title}" if ended == "memory" else "were not looked at"
    if knee == largest:
        return f"larger ones may bring more and {why}"
    return f"up to {samples * largest:,} bring {more}, and larger ones {why}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# Families -------------------------------------------------------------------------------------------------------------


def family(context: Context) -> Iterator[Advice]:
    """Yield the families of image classifiers that suit the device, for an image classifier."""
    suited = families_for(context.device)[:BEST_FAMILIES]
    if not suited or not _classifies_images(context):
        return
    yield Advice(
        rule="family",
        title=f"Compare with families designed for such devices: {', '.join(entry.name for entry in suited)}",
        seen="; ".join(f"{entry.name}: {entry.why}" for entry in suited),
        how="; ".join(f"narrowcast advise {entry.example} --device {context.device.name}" for entry in suited),
        source="; ".join(f"{entry.name}: {entry.source}" for entry in suited),
        limits="their authors' devices are near to this one, not the same: compare estimates, then measure",
        effort="retrain",
    )


def _classifies_images(context: Context) -> bool:
    computed = [operator for operator in context.operators if operator.kind is not Kind.VIEW]
    if not computed or not context.profile.inputs or len(context.profile.inputs[0]) != 4:
        return False
    image, out = context.profile.inputs[0], computed[-1].outputs[:1]
    convolves = any(operator.kind is Kind.CONVOLUTION for operator in computed)
    return convolves and image[1] <= IMAGE_CHANNELS and bool(out) and len(out[0]) == 2 and out[0][0] == image[0]
