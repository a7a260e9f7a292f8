"""Integers and floats with a scale per tensor, channel or block: ranges, zero points, importance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from format_engines import ENGINES, running_on

import narrowcast.formats as nf
from narrowcast.errors import FormatError


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.1, 3, (shape[0], *[1] * (len(shape) - 1)))).astype(np.float32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_symmetric_integers_follow_their_formula(bits: int, engine: str) -> None:
    x = weights(8, 50)
    top = 2 ** (bits - 1) - 1
    with running_on(engine):
        found = nf.quantize(x, f"int{bits}", granularity=nf.PerChannel(0))
    scale = np.abs(x).max(axis=1) / np.float32(top)
    codes = np.clip(np.rint(x / scale[:, None]), -top - 1, top).astype(np.int64)
    assert (found.scales == scale).all()
    assert (found.codes == codes & (2**bits - 1)).all()
    assert (found.dequantize() == codes.astype(np.float32) * scale[:, None]).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["int8", "uint8", "int4", "uint4", "uint16"])
def test_asymmetric_integers_agree_with_torch(name: str, engine: str) -> None:
    x = np.abs(weights(8, 64)) + np.float32(0.3)
    x[3] -= 5
    with running_on(engine):
        found = nf.quantize(x, name, granularity=nf.PerChannel(0), symmetric=False)
    element = nf.get(name)
    assert isinstance(element, nf.Integer)
    scales, zero_points = torch.from_numpy(found.scales), torch.from_numpy(found.zero_points)
    lowest, highest = int(element.min), int(element.max)
    wanted = torch.fake_quantize_per_channel_affine(torch.from_numpy(x), scales, zero_points.int(), 0, lowest, highest)
    # torch multiplies by the reciprocal, which moves a few ties by one step.
    differing = np.abs(found.dequantize() - wanted.numpy()) > found.scales[:, None] * 1e-3
    assert differing.mean() < 0.002
    assert (np.abs(found.dequantize() - x) <= found.scales[:, None] * 0.5001).all()
    assert ((found.zero_points >= lowest) & (found.zero_points <= highest)).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", ["fp16", "bf16", "e8m0", "e5m2"])
@pytest.mark.parametrize("name", ["int8", "uint4"])
def test_zero_points_belong_to_the_scales_that_are_stored(name: str, scale: str, engine: str) -> None:
    x = np.abs(weights(8, 64)) + np.float32(0.3)
    with running_on(engine):
        found = nf.quantize(x, name, granularity=nf.PerChannel(0), symmetric=False, scale=scale)
    element = nf.get(name)
    assert isinstance(element, nf.Integer)
    scales, zeros = found.scales[:, None], np.asarray(found.zero_points)[:, None]
    assert (nf.cast(found.scales, scale) == found.scales).all()
    reached = (x >= (element.min - zeros - 0.5) * scales) & (x <= (element.max - zeros + 0.5) * scales)
    assert reached.mean() > 0.75
    assert (np.abs(found.dequantize() - x)[reached] <= np.broadcast_to(scales, x.shape)[reached] * 0.5001).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", ["fp16", "e8m0", "e5m2", "e4m3fn"])
@pytest.mark.parametrize("name", ["uint8", "int4", "uint4"])
def test_mse_is_never_worse_than_minmax_with_narrow_scales(name: str, scale: str, symmetric: bool) -> None:
    x = weights(8, 64) + np.float32(1)
    error = {}
    for range in ("minmax", "mse"):
        found = nf.quantize(x, name, block=32, symmetric=symmetric, scale=scale, range=range)
        error[range] = ((found.dequantize().astype(np.float64) - x) ** 2).sum()
    assert error["mse"] <= error["minmax"] * (1 + 1e-6)


def test_zero_is_always_exact() -> None:
    x = np.linspace(3, 9, 64, dtype=np.float32).reshape(1, 64)
    x[0, 0] = 0
    for symmetric in (True, False):
        assert nf.quantize(x, "uint8", symmetric=symmetric).dequantize()[0, 0] == 0


def test_an_unsigned_symmetric_integer_has_its_zero_in_the_middle() -> None:
    x = weights(4, 32)
    unsigned, signed = nf.quantize(x, "uint8"), nf.quantize(x, "int8")
    assert (unsigned.zero_points == 128).all()
    assert (unsigned.dequantize() == signed.dequantize()).all()


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (nf.PerTensor(), ()),
        (nf.PerChannel(0), (6,)),
        (nf.PerChannel(1), (8,)),
        (nf.PerChannel(-1), (10,)),
        (nf.PerBlock(4, axis=1), (6, 2, 10)),
        (nf.PerBlock(5), (6, 8, 2)),
    ],
)
def test_who_shares_a_scale(granularity: nf.Granularity, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((6, 8, 10)).astype(np.float32)
    found = nf.quantize(x, "int8", granularity=granularity)
    assert found.scales.shape == shape
    if isinstance(granularity, nf.PerChannel):
        others = tuple(axis for axis in range(3) if axis != granularity.axis % 3)
        assert (found.scales == np.abs(x).max(axis=others) / np.float32(127)).all()
    spread = np.abs(found.dequantize() - x).max()
    assert 0 < spread <= float(np.max(found.scales)) * 0.5001


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "nf4", "mxfp4", "nvfp4", "e4m3fn", "e2m1"])
@pytest.mark.parametrize("engine", ENGINES)
def test_searching_for_the_least_squared_error_finds_less_of_it(name: str, engine: str) -> None:
    x = np.random.default_rng(3).standard_t(4, (16, 256)).astype(np.float32)
    with running_on(engine):
        plain = nf.error(x, nf.quantize(x, name))
        searched = nf.error(x, nf.quantize(x, name, range="mse"))
    assert searched.mse < plain.mse


def test_the_search_also_moves_zero_points() -> None:
    x = np.random.default_rng(3).exponential(1.0, (4, 512)).astype(np.float32) - np.float32(0.2)
    plain = nf.quantize(x, "uint4", granularity=nf.PerChannel(0), symmetric=False)
    searched = nf.quantize(x, "uint4", granularity=nf.PerChannel(0), symmetric=False, range="mse")
    assert nf.error(x, searched).mse < 0.9 * nf.error(x, plain).mse


def test_no_better_scale_lies_near_the_one_that_was_found() -> None:
    x = np.random.default_rng(8).standard_normal((1, 512)).astype(np.float32)
    scale = float(nf.quantize(x, "int4", range="mse").scales)
    found = nf.error(x, nf.quantize(x, "int4", range="mse")).mse
    for factor in np.linspace(0.5, 1.5, 201):
        steps = np.clip(np.rint(x / (scale * factor)), -8, 7) * (scale * factor)
        assert np.square(x - steps).mean() >= 0.995 * found


def test_importance_moves_the_error_to_where_it_counts_less() -> None:
    x = np.random.default_rng(4).standard_normal((8, 256)).astype(np.float32)
    importance = np.ones(256)
    importance[:8] = 1000
    weighed = nf.quantize(x, "int3", granularity=nf.PerChannel(0), range="mse", importance=importance)
    plain = nf.quantize(x, "int3", granularity=nf.PerChannel(0), range="mse")

    def error_there(q: nf.QuantizedTensor) -> float:
        return float(np.square(q.dequantize() - x)[:, :8].sum())

    assert error_there(weighed) < error_there(plain)
    assert nf.error(x, weighed).mse >= nf.error(x, plain).mse


@pytest.mark.parametrize("importance", [np.ones(7), np.full(256, -1.0), np.full(256, np.nan), np.full(256, np.inf)])
def test_importance_that_cannot_be_is_refused(importance: np.ndarray) -> None:
    with pytest.raises(FormatError, match="importance"):
        nf.quantize(np.ones((8, 256)), "int8", range="mse", importance=importance)


@pytest.mark.parametrize("range", ["minmax", "percentile"])
def test_importance_that_nothing_reads_is_refused(range: str) -> None:
    with pytest.raises(FormatError, match=f"importance with range = '{range}'"):
        nf.quantize(np.ones((8, 256)), "int8", range=range, importance=np.ones(256))


@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4"])
def test_a_block_of_nothing_is_refused(format: str) -> None:
    with pytest.raises(FormatError, match="a block of 0 elements"):
        nf.quantize(np.ones((8, 256)), format, block=0)


def test_a_tensor_without_numbers_is_refused() -> None:
    with pytest.raises(FormatError, match="meta device"):
        nf.quantize(torch.empty(2, 64, device="meta"), "nf4")


def test_a_percentile_leaves_outliers_out() -> None:
    x = np.random.default_rng(4).standard_normal((1, 10_000)).astype(np.float32)
    x[0, 0] = 500
    plain, cut = nf.quantize(x, "int8"), nf.quantize(x, "int8", range="percentile", percentile=99.9)
    assert float(cut.scales) == pytest.approx(np.percentile(np.abs(x), 99.9) / 127, rel=1e-6)
    assert nf.error(x, plain).overflowed == 0
    assert 0 < nf.error(x, cut).overflowed <= 0.0011


def test_scaled_floats_use_their_whole_range() -> None:
    x = weights(8, 64)
    found = nf.quantize(x, "e4m3fn", granularity=nf.PerChannel(0))
    assert (found.scales == np.abs(x).max(axis=1) / np.float32(448)).all()
    assert (np.abs(nf.decode(found.codes, "e4m3fn")).max(axis=1) == 448).all()


def test_double_precision_is_worked_on_in_double_precision() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64))
    found = nf.quantize(x, "int16", granularity=nf.PerChannel(0))
    scale = (np.abs(x).max(axis=1) / 32767).astype(np.float32).astype(np.float64)
    assert found.dequantize().dtype == np.float64
    assert (found.dequantize() == np.rint(x / scale[:, None]) * scale[:, None]).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rounding", ["toward_zero", "up", "down", "nearest_away", "to_odd", "stochastic"])
def test_elements_are_rounded_as_asked(rounding: str, engine: str) -> None:
    x = weights(4, 5000)
    with running_on(engine):
        found = nf.quantize(x, "int4", granularity=nf.PerChannel(0), rounding=rounding, seed=3)
    scaled = x / found.scales[:, None]
    if rounding == "stochastic":
        assert abs((nf.decode(found.codes, "int4") - scaled).mean()) < 4 * 0.5 / np.sqrt(x.size)
    else:
        wanted = nf.encode(scaled, "int4", rounding=rounding)
        assert (found.codes == wanted).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"format": "int8", "block": 4, "granularity": nf.PerTensor()}, "block = 4 and granularity"),
        ({"format": "mxfp4", "granularity": nf.PerTensor()}, "granularity = PerTensor"),
        ({"format": "nf4", "symmetric": False}, "symmetric=False with nf4"),
        ({"format": "int8", "axis": 0}, "axis = 0 without blocks"),
        ({"format": "int8", "range": "minmx"}, "did you mean minmax"),
        ({"format": "int8", "range": "percentile", "percentile": 0}, "percentile = 0"),
        ({"format": "mxfp4", "scale_rule": "flor"}, "did you mean floor"),
        ({"format": "mxfp4", "double_quant": True}, "double_quant with e8m0"),
        ({"format": "int8", "granularity": nf.PerChannel(5)}, "axis 5 of a tensor of shape"),
        ({"format": "fp32"}, "fp32 elements with a scale"),
        ({"format": "e8m0"}, "which have no zero"),
        ({"format": "int8", "symmetric": False, "rounding": "up"}, "rounding = 'up'"),
        ({"format": "int8", "rounding": "sideways"}, "sideways"),
        ({"format": "int9000"}, "unknown number format 'int9000'"),
    ],
)
def test_contradictions_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        nf.quantize(np.ones((8, 8), np.float32), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int8", "nf4", "e4m3fn"])
def test_what_no_fp32_scale_can_say_is_refused(name: str, value: float) -> None:
    x = np.ones((4, 64), np.float32)
    x[2, 5] = value
    granularity = nf.PerChannel(0)
    with pytest.raises(FormatError, match="in row 2 of those that share a scale"):
        nf.quantize(x, name, granularity=granularity)


@pytest.mark.parametrize(
    ("scale", "bits"), [("fp32", 5.0), ("fp16", 4.5), ("bf16", 4.5), ("e4m3fn", 4.25), ("e8m0", 4.25)]
)
def test_scales_may_be_kept_in_fewer_bits(scale: str, bits: float) -> None:
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    found = nf.quantize(x, "int4", block=32, scale=scale)
    assert found.bits_per_element == bits
    kept = nf.cast(found.scales, scale)
    assert (kept == found.scales).all()
    steps = nf.decode(found.codes, "int4", dtype="float32")
    assert (found.dequantize() == steps * np.repeat(found.scales, 32, axis=1)).all()
    if scale != "e8m0":  # whose steps double
        assert nf.error(x, found).sqnr_db == pytest.approx(
            nf.error(x, nf.quantize(x, "int4", block=32)).sqnr_db, abs=0.2
        )


def test_a_range_that_the_scale_cannot_hold_is_refused() -> None:
    x = np.full((2, 32), 1e7, np.float32)
    with pytest.raises(FormatError, match="a range beyond fp16 in row 0"):
        nf.quantize(x, "int4", block=32, scale="fp16")
    with pytest.raises(FormatError, match="scale = 'fp16' with mxfp4, which says e8m0"):
        nf.quantize(x, "mxfp4", scale="fp16")
    with pytest.raises(FormatError, match="int8 scales"):
        nf.quantize(x, "int4", scale="int8")
