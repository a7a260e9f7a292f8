"""Comparing weights in formats: piece by piece must give what whole tensors give."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import narrowcast.formats as nf
from narrowcast.errors import FormatError, ModelError
from narrowcast.measure import weights as module
from narrowcast.measure.comparison import BINS, Comparison
from narrowcast.measure.treatments import DEFAULT_FORMATS, treatments
from narrowcast.measure.weights import compare_weights
from narrowcast.models.stored import Weights, open_weights

CHANNEL = {"granularity": nf.PerChannel(0)}
BLOCK = {"granularity": nf.PerBlock(32), "pad": True}
#: What each name must mean; None is a cast.
MEANS: dict[str, dict[str, object] | None] = {
    "fp16": None,
    "bf16": None,
    "tf32": None,
    "fp32": None,
    "e4m3fn": CHANNEL,
    "e5m2": CHANNEL,
    "int16": CHANNEL,
    "int8": CHANNEL,
    "uint8": CHANNEL | {"symmetric": False},
    "int4": BLOCK,
    "int2": BLOCK,
    "uint4": BLOCK | {"symmetric": False},
    "e2m1": BLOCK,
    "nf4": {"granularity": nf.PerBlock(64), "pad": True},
    "mxfp4": {"pad": True},
    "mxint8": {"pad": True},
    "nvfp4": {"pad": True},
}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {
        "linear": rng.standard_normal((40, 96)) * 0.02,
        "conv": rng.standard_t(3, (12, 5, 3, 3)),
        "rows": rng.standard_normal((3, 1000)) * np.array([[1e-3], [1.0], [40.0]]),
        "bias": rng.standard_normal(70),
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


@pytest.fixture
def model(tmp_path: Path) -> Weights:
    save_file(arrays() | {"ids": np.arange(7)}, tmp_path / "m.safetensors")
    return open_weights(str(tmp_path / "m.safetensors"))


def compare(model: Weights, *names: str, **options: object) -> Comparison:
    return compare_weights(model, treatments(names, str(options.get("range", "minmax"))), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", [1, 300, 1 << 20])
@pytest.mark.parametrize("name", MEANS)
def test_pieces_give_what_whole_tensors_give(
    model: Weights, name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    found = {tensor.name: tensor for tensor in compare(model, name, vectors=True).tensors}
    for tensor, array in arrays().items():
        matrix = array.reshape(len(array), -1) if array.ndim > 1 else array[None]
        means = MEANS[name]
        whole = nf.cast(matrix, name) if means is None else nf.quantize(matrix, name, **means)  # type: ignore[arg-type]
        with np.errstate(over="ignore"):
            expected = nf.error(matrix, whole, name if means is None else None)
        result = found[tensor].formats[name]
        assert result.error is not None
        for field, value in vars(expected).items():
            got = getattr(result.error, field)
            assert got == (value if value is None else pytest.approx(value, rel=1e-9)), field
        nbytes = (
            whole.nbytes if isinstance(whole, nf.QuantizedTensor) else matrix.size * (4 if name in "tf32 fp32" else 2)
        )
        assert result.nbytes == nbytes
        assert result.bits_per_element == 8 * nbytes / array.size
        if isinstance(whole, nf.QuantizedTensor):
            assert result.largest_scale == pytest.approx(float(whole.scales.max()))
            used = whole.scales[whole.scales > 0]
            assert result.typical_scale == pytest.approx(math.exp(np.log(used.astype(np.float64)).mean()))


def test_rows_too_long_to_work_on_side_by_side_give_the_same(model: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compare(model, *DEFAULT_FORMATS)
    monkeypatch.setattr(module, "_LONG", 10)
    assert repr(compare(model, *DEFAULT_FORMATS)) == repr(expected)


@pytest.mark.parametrize("range", ["percentile", "mse"])
def test_the_range_is_passed_on(model: Weights, range: str) -> None:
    result = compare(model, "int4", range=range)
    assert result.range == range
    found = next(tensor for tensor in result.tensors if tensor.name == "linear").formats["int4"].error
    expected = nf.error(arrays()["linear"], nf.quantize(arrays()["linear"], "int4", range=range, **BLOCK))  # type: ignore[arg-type]
    plain = nf.error(arrays()["linear"], nf.quantize(arrays()["linear"], "int4", **BLOCK))  # type: ignore[arg-type]
    assert found is not None
    assert found.sqnr_db == pytest.approx(expected.sqnr_db)
    assert found.sqnr_db != pytest.approx(plain.sqnr_db, abs=1e-3)


def test_the_whole_is_the_sum_of_its_tensors(model: Weights) -> None:
    found = compare(model, "int8", "mxfp4")
    kept = {item.name: item for item in found.left_out}
    assert set(kept) == {"bias", "ids"}
    assert kept["bias"].reason == "a vector"
    assert found.nbytes == sum(array.nbytes for array in arrays().values()) + 56
    assert found.elements == 40 * 96 + 12 * 45 + 3000
    for totals in found.formats:
        results = [tensor.formats[totals.name] for tensor in found.tensors]
        assert totals.nbytes == sum(item.nbytes for item in results) + 280 + 56
        assert totals.ratio == totals.ratio_fp32 == found.nbytes / totals.nbytes
        signal = sum(
            float(np.square(array, dtype=np.float64).sum()) for name, array in arrays().items() if name != "bias"
        )
        noise = sum(item.noise for item in results)
        assert totals.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
        assert totals.worst == max(found.tensors, key=lambda tensor: tensor.formats[totals.name].damage).name


def test_ratios_count_from_the_model_and_from_fp32(tmp_path: Path) -> None:
    save_file({"w": np.ones((8, 64), np.float16)}, tmp_path / "half.safetensors")
    totals = compare(open_weights(str(tmp_path / "half.safetensors")), "int8").formats[0]
    assert totals.nbytes == 8 * 64 + 4 * 8
    assert (totals.ratio, totals.ratio_fp32) == (1024 / 544, 2048 / 544)


def test_tensors_are_sorted_by_the_damage_of_the_narrowest_format(model: Weights, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    signs = rng.choice([-1.0, 1.0], (8, 320)).astype(np.float32)
    signs[:, 0] = 8.03  # ruins a whole channel for int8, and one block of ten for int2
    save_file(
        {"signs": signs, "normal": rng.standard_normal((8, 320)).astype(np.float32)}, tmp_path / "two.safetensors"
    )
    two = open_weights(str(tmp_path / "two.safetensors"))
    found = compare(two, "int8", "int2")
    assert (found.sort, [tensor.name for tensor in found.tensors]) == ("int2", ["normal", "signs"])
    assert [tensor.name for tensor in compare(two, "int8", "int2", sort="int8").tensors] == ["signs", "normal"]
    for sort in (None, "int8", "nf4"):
        found = compare(model, "int8", "nf4", "int2", sort=sort)
        damage = [tensor.formats[sort or "int2"].damage for tensor in found.tensors]
        assert damage == sorted(damage, reverse=True)
        assert damage[0] > damage[-1]
    with pytest.raises(FormatError, match="which is not compared"):
        compare(model, "int8", sort="int4")


@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_histograms_count_every_number_once(model: Weights, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    for tensor in compare(model, "int8").tensors:
        array = arrays()[tensor.name]
        assert (tensor.low, tensor.high) == (array.min(), array.max())
        expected, _ = np.histogram(array.astype(np.float64), BINS, (tensor.low, tensor.high))
        assert sum(tensor.counts) == array.size
        # A number on an edge may fall to either side in float32.
        assert np.abs(np.cumsum(tensor.counts) - np.cumsum(expected)).max() <= 2


@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_nan_and_infinity_are_counted_and_the_rest_is_judged(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    weights = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    broken = weights.copy()
    broken[3, 5], broken[9, 9], broken[9, 10] = np.nan, np.inf, -np.inf
    save_file({"w": broken, "nothing": np.full((4, 4), np.nan, np.float32)}, tmp_path / "m.safetensors")
    found = compare(open_weights(str(tmp_path / "m.safetensors")), *DEFAULT_FORMATS)
    (tensor,) = found.tensors
    assert tensor.not_finite == 3
    assert sum(tensor.counts) == 16 * 64 - 3
    assert [(item.name, item.reason) for item in found.left_out] == [("nothing", "NaN and infinity alone")]
    repaired = np.where(np.isfinite(broken), broken, 0)
    for name, result in tensor.formats.items():
        means = MEANS[name]
        whole = nf.cast(repaired, name) if means is None else nf.quantize(repaired, name, **means)  # type: ignore[arg-type]
        expected = nf.error(repaired, whole, name if means is None else None)
        assert result.error is not None
        assert result.error.count == 16 * 64 - 3
        assert result.error.sqnr_db == pytest.approx(expected.sqnr_db)


def test_what_a_format_cannot_hold_stops_nothing(tmp_path: Path) -> None:
    save_file({"wide": np.full((4, 32), 1e200), "w": np.ones((4, 32), np.float32)}, tmp_path / "m.safetensors")
    found = compare(open_weights(str(tmp_path / "m.safetensors")), "fp16", "int8")
    assert found.tensors[0].name == "wide"
    lost = found.tensors[0].formats["int8"]
    assert lost.error is None
    assert "beyond fp32" in lost.failure
    assert lost.nbytes == 4 * 32 * 8
    assert [item.failed for item in found.formats] == [0, 1]
    cast = found.tensors[0].formats["fp16"].error
    assert cast is not None
    assert (cast.overflowed, cast.sqnr_db) == (1.0, -math.inf)


@pytest.mark.parametrize(
    "content",
    [{}, {"bias": np.ones(5, np.float32)}, {"ids": np.ones((2, 2), np.int8)}, {"none": np.ones((0, 3), np.float32)}],
)
def test_a_model_without_weights_is_a_typed_error(tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    save_file(content, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="holds no weights to compare"):
        compare(open_weights(str(tmp_path / "m.safetensors")), "int8")


def test_progress_goes_to_the_end_and_never_back(model: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 500)
    shares: list[float] = []

    class Heard:
        def stage(self, name: str, share: float = 0.0) -> None:
            assert name in arrays()
            shares.append(share)

    compare(model, "int8", tell=Heard())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 3


def test_no_more_than_a_piece_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": np.ones((1000, 50), np.float32)}, tmp_path / "m.safetensors")
    model = open_weights(str(tmp_path / "m.safetensors"))
    monkeypatch.setattr(module, "_PIECE", 2000)
    sizes: list[int] = []
    read = np.fromfile

    def noted(*arguments: object, **options: object) -> np.ndarray:
        found = read(*arguments, **options)  # type: ignore[call-overload]
        sizes.append(found.size)
        return found

    monkeypatch.setattr(np, "fromfile", noted)
    compare(model, "int8", "nvfp4")
    assert max(sizes) == 2000
    assert sum(sizes) == 2 * 50_000


def test_names_are_checked_before_anything_is_read() -> None:
    with pytest.raises(FormatError, match="unknown number format 'int9'"):
        treatments(["int8", "int9"])
    with pytest.raises(FormatError, match="no format to compare"):
        treatments([])
    with pytest.raises(FormatError, match="which have no zero"):
        treatments(["e8m0"])
    for name in ("fp16", "int8"):
        with pytest.raises(FormatError, match="unknown range 'widest'"):
            treatments([name], "widest")
    assert [item.name for item in treatments(["half", "fp16", "fp8"])] == ["fp16", "e4m3fn"]


def test_every_format_but_that_of_scales_can_be_named() -> None:
    made = treatments([name for name in nf.names() if name != "e8m0"])
    assert len(made) == len(nf.names()) - 1
    assert all(item.words for item in made)
