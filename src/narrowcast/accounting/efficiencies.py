"""How much of a device's peaks runtimes reach, by classes of operators: the numbers that turn a roofline into a time.

They are shares of the peaks in the catalogue, so that numbers fitted on one device serve others of its kind. Those of
``efficiencies.toml`` (measured) and ``efficiencies_npu.toml`` (from published throughputs) come with the package; a measured
device (``auto``) carries its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from narrowcast.accounting.classes import OperatorClass, Shape
from narrowcast.errors import RuntimeMissingError, choices

__all__ = ["Load", "Rates", "RuntimeModel", "runtime_model"]

_Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Load(NamedTuple):
    """What one kernel has to do.

    Args:
        flops: Two for each multiply-accumulate.
        shape: Of its product; None if it multiplies no matrices.
        moved: Bytes that it reads and writes, weights aside.
        weights: Bytes of its weights.
        cached: Whether a cache holds what it moves.
        weights_cached: Whether a cache holds its weights from one run to the next.
    """

    flops: float
    shape: Shape | None
    moved: float
    weights: float = 0.0
    cached: bool = False
    weights_cached: bool = False


class Rates(BaseModel):
    """What a class of operators reaches.

    A product of ``[batch, rows, depth]`` with ``[batch, depth, columns]`` takes ``flops / (peak * compute)`` times ``1 +
    rows_half / rows + columns_half / columns + depth_half / depth + outputs_half / (batch * rows * columns)``: with
    ``rows_half`` rows, half of the speed is left. What all its tensors take to move comes beside that, not on top of it.

    Args:
        compute: Share of the peak that large products reach.
        rows_half: See above; what each weight costs.
        columns_half: See above; what each input costs.
        depth_half: See above; what each output costs.
        outputs_half: See above; how many sums a device needs to be busy.
        bandwidth: Share of the memory's bandwidth, for tensors that no cache holds.
        cached: The same for tensors in a cache; may be more than 1.
        weights: The same for weights that no cache holds.
        fixed_us: Microseconds that a kernel takes however small it is.
        host: Times that queueing one costs the host, in those of a simple elementwise operator.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute: Annotated[float, Field(gt=0, le=1)] = 1.0
    rows_half: _NotNegative = 0.0
    columns_half: _NotNegative = 0.0
    depth_half: _NotNegative = 0.0
    outputs_half: _NotNegative = 0.0
    bandwidth: _Share = 1.0
    cached: _Share = 1.0
    weights: _Share = 1.0
    fixed_us: _NotNegative = 0.0
    host: _NotNegative = 1.0

    def compute_seconds(self, load: Load, peak: float) -> float:
        """Return what the arithmetic takes, at a peak in FLOP/s."""
        if load.shape is None:
            return 0.0
        batch, rows, columns, depth = load.shape
        small = self.rows_half / rows + self.columns_half / columns + self.depth_half / depth
        small += self.outputs_half / (batch * rows * columns)
        return load.flops * (1.0 + small) / (peak * self.compute)

    def memory_seconds(self, load: Load, bandwidth: float) -> float:
        """Return what the bytes take, at a bandwidth in bytes per second."""
        seconds = load.moved / (self.cached if load.cached else self.bandwidth)
        seconds += load.weights / (self.cached if load.weights_cached else self.weights)
        return seconds / bandwidth

    def seconds(self, load: Load, peak: float, bandwidth: float) -> float:
        """Return what a kernel takes once it has begun."""
        longest = max(self.compute_seconds(load, peak), self.memory_seconds(load, bandwidth))
        return self.fixed_us * 1e-6 + longest


class RuntimeModel(BaseModel):
    """How one runtime spends time on one kind of device.

    Args:
        runtime: Its name.
        asynchronous: Whether the host queues kernels while the device runs: then the slower of the two decides.
        operator_us: Microseconds that an operator costs the host (asynchronous), or the run beside its kernel (else).
        view: Times that a view costs, in those of an operator.
        low: The error band: measured times lie between ``low`` and ``high`` times the estimate.
        high: See above.
        elsewhere_low: The same on devices of the kind that the rates were not measured on; None if nobody looked.
        elsewhere_high: See above.
        elsewhere_source: Where the numbers come from on such devices.
        peak: FLOP/s of the device that the rates were measured on, in the format that they were; like ``ridge``.
        ridge: FLOP per byte of the device that the rates were measured on; None on that device itself, and where the rates
            are taken to be the same shares of every device's peaks.
        classes: Rates by class of operators.
        source: Where the numbers come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: Annotated[str, Field(min_length=1)]
    asynchronous: bool = False
    operator_us: _NotNegative
    view: _NotNegative = 0.0
    low: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(ge=1)]
    elsewhere_low: Annotated[float, Field(gt=0, le=1)] | None = None
    elsewhere_high: Annotated[float, Field(ge=1)] | None = None
    elsewhere_source: str = ""
    peak: _Share | None = None
    ridge: _Share | None = None
    classes: Mapping[OperatorClass, Rates]
    source: Annotated[str, Field(min_length=1)]

    def rates(self, kind: OperatorClass) -> Rates:
        """Return what a class reaches; that of the class most like it where nobody measured it."""
        return self.classes.get(kind) or self.classes.get(_ALIKE.get(kind, kind)) or Rates()

    def elsewhere(self, ridge: float, peak: float | None = None) -> RuntimeModel:
        """Return the model for a device that the rates were not measured on, with the band that holds there.

        Kernels that leave most of a peak unused wait for data, so their speed follows the bandwidth: on a device with fewer
        FLOP per byte they reach a larger share of the peak, up to that of matrix products, and half of it at smaller sizes.
        What a device with too few sums to be busy waits for is the latency of each term of a sum, which differs little from
        one device to the next: so a device of a smaller peak is busy with as many sums fewer.

        Args:
            ridge: The other device's FLOP per byte.
            peak: The other device's FLOP/s; as many as the first one's unless given.
        """
        band = {"low": self.elsewhere_low or self.low, "high": self.elsewhere_high or self.high}
        told = {"source": self.elsewhere_source or self.source, **band}
        if self.ridge is None:
            return self.model_copy(update=told)
        most = self.rates(OperatorClass.PRODUCT).compute
        factor = max(self.ridge / ridge, 1.0)
        halves = ("rows_half", "columns_half", "depth_half")
        units = peak / self.peak if peak and self.peak else 1.0
        classes = {
            kind: rates.model_copy(
                update={"compute": max(min(rates.compute * factor, most), min(rates.compute, most))}
                | {name: getattr(rates, name) / factor for name in halves}
                | {"outputs_half": rates.outputs_half * units}
            )
            for kind, rates in self.classes.items()
        }
        return self.model_copy(update={"classes": classes, **told})


#: What a class is taken to be like, if it was not measured.
_ALIKE = {
    OperatorClass.IMAGE: OperatorClass.CONVOLUTION,
    OperatorClass.POINTWISE: OperatorClass.PRODUCT,
    OperatorClass.BATCHED: OperatorClass.PRODUCT,
    OperatorClass.RECURRENT: OperatorClass.PRODUCT,
    OperatorClass.TRANSCENDENTAL: OperatorClass.ELEMENTWISE,
}
#: Runtime that an estimate is for, by the device's kind, if none is asked for.
DEFAULT_RUNTIMES = {"cpu": "onnxruntime", "soc": "onnxruntime", "gpu": "torch", "npu": "compiled"}
#: Kinds of devices whose rates serve a kind.
_PLACES = {"cpu": "cpu", "soc": "cpu", "gpu": "gpu", "npu": "npu"}
_FILES = ("efficiencies.toml", "efficiencies_npu.toml")


@cache
def _packaged() -> dict[str, RuntimeModel]:
    found: dict[str, RuntimeModel] = {}
    for file in _FILES:
        text = resources.files("narrowcast.accounting").joinpath(file).read_text(encoding="utf-8")
        found |= {name: RuntimeModel.model_validate(table) for name, table in tomllib.loads(text).items()}
    return found


def runtime_model(kind: str, runtime: str | None = None) -> RuntimeModel:
    """Return what the package knows of a runtime on devices of a kind.

    Args:
        kind: ``gpu``, ``cpu``, ``soc`` or ``npu``.
        runtime: ``onnxruntime``, ``torch`` or ``compiled`` (whole graphs by the vendor's compiler); the usual one of the
            kind unless given.

    Raises:
        RuntimeMissingError: Nothing was fitted for that runtime on that kind.
    """
    known = {key.partition("-")[2]: model for key, model in _packaged().items() if key.startswith(f"{_PLACES[kind]}-")}
    name = runtime or DEFAULT_RUNTIMES[kind]
    if name not in known:
        raise RuntimeMissingError(f"no efficiencies of {name!r} on a {kind}", allowed=choices(name, known))
    return known[name]
