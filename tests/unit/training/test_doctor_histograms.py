"""Histograms against NumPy's own logarithms, and what formats would do against the formats themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowcast import formats as nf
from narrowcast.errors import FormatError
from narrowcast.formats.kinds import Codebook, Format, Integer
from narrowcast.formats.table import BLOCKS, ELEMENTS
from narrowcast.training.doctor.buckets import (
    BUCKETS,
    EDGES,
    INFINITE,
    INFINITE_COLUMN,
    NAN_COLUMN,
    NOT_A_NUMBER,
    column_exponent,
    fold,
    largest_edge,
    smallest_edge,
)
from narrowcast.training.doctor.histograms import Counter, dense_view, sampled
from narrowcast.training.doctor.histories import shifted
from narrowcast.training.doctor.whatif import overflow_limit, shares, stagnant, underflow_limit

torch.set_num_threads(1)


def counted(*tensors, divisor=1.0):
    counter = Counter(1, torch.device("cpu"))
    for tensor in tensors:
        counter.add(0, tensor, divisor)
    return counter.counts[0].numpy(), float(counter.largest[0])


def wide_numbers(seed=0, count=50_000, low=-45, high=40):
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal(count) * np.exp2(rng.uniform(low, high, count))
    return torch.from_numpy(numbers.astype(np.float32))


def test_special_numbers_have_buckets_of_their_own():
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)  # odd NaN
    counts, largest = counted(
        torch.tensor([0.0, -0.0, 1e-45, torch.inf, -torch.inf, torch.nan, 3.4028234e38, 1.0, -1.5]), bits
    )
    assert counts[0] == 2
    assert counts[1] == 1
    assert counts[INFINITE - 1] == 1
    assert counts[INFINITE] == 2
    assert counts[NOT_A_NUMBER] == 3
    assert counts.sum() == 11
    assert largest == torch.finfo(torch.float32).max
    columns = fold(counts)
    assert (columns[0], columns[INFINITE_COLUMN], columns[NAN_COLUMN]) == (2, 2, 3)
    assert columns.sum() == 11


def test_each_number_lies_between_the_edges_of_its_bucket():
    numbers = wide_numbers()
    counts, largest = counted(numbers)
    sizes = numbers.abs().double().numpy()
    expected = np.searchsorted(EDGES, sizes, side="left")
    assert (np.bincount(expected, minlength=BUCKETS) == counts).all()
    assert largest == sizes.max()
    assert smallest_edge(counts) < sizes.min()
    assert largest_edge(counts) >= sizes.max()


def test_columns_are_octaves():
    numbers = wide_numbers()
    columns = fold(counted(numbers)[0])
    sizes = numbers.abs().double().numpy()
    for column in (100, 128, 150):
        low = 2.0 ** column_exponent(column)
        assert columns[column] == ((sizes > low) & (sizes <= 2 * low)).sum()
    with pytest.raises(ValueError, match="no octave"):
        column_exponent(0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype_counts_as_its_numbers_in_fp32(dtype):
    numbers = wide_numbers(low=-8, high=7).to(dtype)
    assert (counted(numbers)[0] == counted(numbers.float())[0]).all()


def test_layouts_and_divisors_do_not_matter():
    numbers = wide_numbers(count=4 * 6 * 8 * 10)
    plain, _ = counted(numbers)
    image = numbers.view(4, 6, 8, 10)
    for view in (image.to(memory_format=torch.channels_last), image.transpose(1, 3), image.permute(2, 0, 3, 1)):
        assert (counted(view)[0] == plain).all()
        assert dense_view(view).data_ptr() == view.data_ptr()
    doubled = torch.stack([image, image], -1)[..., 0]  # not dense
    assert (counted(doubled)[0] == plain).all()
    assert (counted(numbers * 1024, divisor=torch.tensor(1024.0))[0] == plain).all()
    assert (counted(torch.view_as_complex(numbers.view(-1, 2)))[0] == plain).all()
    assert (counted(torch.empty(0))[0] == 0).all()


def test_samples_are_spread_evenly():
    numbers = torch.arange(100.0)
    assert sampled(numbers, 200).numel() == 100
    assert sampled(numbers, 30).tolist() == numbers[::4].tolist()


def test_shifting_a_histogram_is_scaling_its_numbers():
    numbers = wide_numbers(low=-30, high=30)
    counts, _ = counted(numbers, torch.tensor([0.0, torch.inf, torch.nan]))
    scaled, _ = counted(numbers * 64, torch.tensor([0.0, torch.inf, torch.nan]))
    assert (shifted(counts, 6) == scaled).all()


def outcome(numbers, format):
    """Return the shares that overflow, become zero and are subnormal, by casting."""
    sizes = numbers.abs().double().numpy()
    if isinstance(format, Format) and not format.has_zero:  # E8M0: no zero to become, and no sign
        rounded = nf.cast(sizes[sizes > 0], Format(10, format.mantissa_bits, name="wide", nan="none"))
        return float((rounded > format.max).sum() / sizes.size), 0.0, 0.0
    signed = numbers.double().numpy() if isinstance(format, Codebook) or format.signed else sizes
    cast = np.abs(nf.cast(signed, format, overflow="saturate"))
    zero = (cast == 0) & (sizes != 0)
    if isinstance(format, Format):
        over = np.abs(nf.cast(signed, Format(10, format.mantissa_bits, name="wide", nan="none"))) > format.max
        small = (cast > 0) & (cast < format.smallest_normal) & format.has_subnormals
        return float(over.mean()), float(zero.mean()), float(small.mean())
    rounded = np.rint(signed / format.step) * format.step if isinstance(format, Integer) else signed
    over = (rounded > format.max) | (rounded < format.min)
    return float(over.mean()), float(zero.mean()), 0.0


@pytest.mark.parametrize("name", sorted(ELEMENTS))
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_shares_bound_what_a_cast_does(name, scale):
    format = ELEMENTS[name]
    numbers = torch.cat(
        [wide_numbers(), torch.zeros(100), torch.exp2(torch.arange(-30.0, 17.0)), torch.arange(-600.0, 600.0)]
    )
    numbers = numbers[numbers.abs() * scale < 2.0**100]
    counts, largest = counted(numbers)
    found = shares(counts, format, scale=scale, largest=largest)
    for bounds, true in zip(
        (found.overflow, found.zero, found.subnormal), outcome(numbers.double() * scale, format), strict=True
    ):
        assert bounds.low - 1e-12 <= true <= bounds.high + 1e-12
    assert found.zeros == pytest.approx(float((numbers == 0).double().mean()))


@pytest.mark.parametrize("name", ["e4m3fn", "fp16", "e5m2", "e2m1"])
def test_underflow_is_exact(name):
    found = shares(counted(wide_numbers())[0], name)
    assert found.zero.low == found.zero.high > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10), st.integers(0, 40))
def test_limits_of_any_format_are_those_of_its_casts(exponent, mantissa, bias):
    format = Format(exponent, mantissa, bias, nan="none")
    over, under = overflow_limit(format), underflow_limit(format)
    below, above = np.nextafter(over, 0), np.nextafter(over, np.inf)
    assert nf.cast(np.array(below), format, overflow="saturate") == format.max
    wide = Format(10, mantissa, name="wide", nan="none")
    assert nf.cast(np.array(above), wide) > format.max >= nf.cast(np.array(below), wide)
    assert nf.cast(np.array(under), format) == 0 < nf.cast(np.array(np.nextafter(under, np.inf)), format)


def test_stagnation_is_half_a_unit_in_the_last_place():
    ratios = torch.tensor([2.0**-9, 2.0**-8, 2.0**-7, 1.5 * 2.0**-8, 0.0])
    found = stagnant(counted(ratios)[0], "bf16")
    assert found == (0.5, 0.5)
    assert stagnant(counted(ratios)[0], "fp32") == (0.0, 0.0)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_block_formats_are_refused(name):
    with pytest.raises(FormatError, match="neighbours"):
        shares(np.zeros(BUCKETS, np.int64), name)


def test_stagnation_in_a_codebook_is_refused():
    with pytest.raises(FormatError, match="last place"):
        stagnant(np.zeros(BUCKETS, np.int64), Codebook("two", (-1.0, 1.0)))
