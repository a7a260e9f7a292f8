"""Histograms against NumPy's own logarithms, and what formats would do against the formats themselves."""

from __future__ import annotations

import math

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
from narrowcast.training.doctor.histograms import Counter, dense_view, sampled, spacing
from narrowcast.training.doctor.histories import shifted
from narrowcast.training.doctor.whatif import overflow_limit, shares, stagnant, underflow_limit

torch.set_num_threads(1)


def counted(*tensors, divisor=1.0, limit=1 << 20):
    counter = Counter(1, torch.device("cpu"))
    for tensor in tensors:
        counter.add(0, sampled(tensor, limit), divisor)
    counter.flush()
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
    assert (counted(numbers * 1024, divisor=1024.0)[0] == plain).all()
    assert (counted(torch.view_as_complex(numbers.view(-1, 2)))[0] == plain).all()
    assert (counted(torch.empty(0))[0] == 0).all()


def test_samples_are_spread_evenly_and_hold_both_ends():
    numbers = torch.arange(100.0)
    assert sampled(numbers, 100).tolist() == numbers.tolist()
    assert spacing(100, 30) == 7  # 4, 5 and 6 have a divisor in common with 100
    assert sampled(numbers, 30).tolist() == [*numbers[::7].tolist(), 0.0, 99.0]
    assert sampled(torch.tensor(3.0), 30).tolist() == [3.0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1 << 40), st.integers(1, 1 << 20))
def test_samples_are_at_most_so_many(numbers, limit):
    distance = spacing(numbers, limit)
    assert -(-numbers // distance) <= limit
    assert distance == 1 or math.gcd(distance, numbers) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_counts_a_small_tensor_in_full(dtype):
    numbers = wide_numbers(low=-8, high=7, count=3_000).view(30, 100).to(dtype)
    sizes = numbers.abs().double().numpy().ravel()
    expected = np.bincount(np.searchsorted(EDGES, sizes, side="left"), minlength=BUCKETS)
    for view in (numbers, numbers.t(), numbers.view(3, 10, 10, 10).to(memory_format=torch.channels_last)):
        counts, largest = counted(view, limit=3_000)
        assert (counts == expected).all()
        assert largest == sizes.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("outlier", [49_152.0, -49_152.0])
def test_the_largest_is_exact_where_the_sample_misses_it(dtype, outlier):
    numbers = torch.rand(64, 1024).to(dtype)
    numbers[0, 1] = outlier  # between the first two numbers of the sample
    counts, largest = counted(numbers, limit=1000)
    assert largest == 49_152.0
    assert counts.sum() == -(-numbers.numel() // spacing(numbers.numel(), 1000)) + 2
    held = shares(counts, "e4m3fn", largest=largest)
    assert 0 < held.overflow.low == held.overflow.high < 0.01
    assert not shares(counts, "e5m2", largest=largest).overflow.high


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_seen_where_the_sample_misses_it(value):
    numbers = torch.rand(64, 1024)
    numbers[0, 1] = value
    counts, largest = counted(numbers, limit=1000)
    found = shares(counts, "fp16", largest=largest)
    assert (found.nan if value != value else found.infinite) > 0
    assert 0.9 < largest < 1


@pytest.mark.parametrize("shape", [(4, 64, 16, 16), (8, 48, 14, 14), (2, 256, 32, 16)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_samples_come_from_all_channels_rows_and_columns_alike(shape, channels_last):
    for axis in range(1, 4):
        sizes = [-1 if place == axis else 1 for place in range(4)]
        numbers = torch.arange(float(shape[axis])).view(sizes).expand(shape)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        image = numbers.contiguous(memory_format=layout)
        taken = sampled(image, image.numel() // 16)[:-2]
        assert taken.numel() > image.numel() // 32
        often = torch.bincount(taken.long(), minlength=shape[axis])
        assert often.min() >= 0.8 * taken.numel() / shape[axis] - 1
        assert often.max() <= 1.2 * taken.numel() / shape[axis] + 1


def test_shares_of_a_sample_are_near_those_of_all():
    image = wide_numbers(count=1 << 20, low=-30, high=10).view(16, 64, 32, 32).to(memory_format=torch.channels_last)
    image *= torch.exp2(torch.arange(64.0) / 8 - 4).view(1, -1, 1, 1)  # channels of very different size
    whole, part = (shares(counted(image, limit=limit)[0], "e5m2").zero.high for limit in (1 << 20, 1 << 16))
    assert 0.2 < whole < 0.8
    assert part == pytest.approx(whole, abs=0.01)  # five standard deviations of 2**16 draws


def test_many_tensors_of_all_kinds_count_as_each_alone():
    counter = Counter(3, torch.device("cpu"))
    given_ = [(place % 3, wide_numbers(place, count=100 + place, low=-8, high=7)) for place in range(12)]
    given_ = [
        (slot, one.to(torch.bfloat16 if place % 2 else torch.float32)) for place, (slot, one) in enumerate(given_)
    ]
    for slot, one in given_:
        counter.add(slot, one, 2.0 if slot == 1 else 1.0)
    counter.flush()
    for slot in range(3):
        alone = [counted(one, divisor=2.0 if slot == 1 else 1.0) for number, one in given_ if number == slot]
        assert (counter.counts[slot].numpy() == sum(counts for counts, _ in alone)).all()
        assert float(counter.largest[slot]) == max(largest for _, largest in alone)


def test_a_known_largest_hides_no_number_beyond_it():
    counts, _ = counted(torch.tensor([1.0, 70_000.0]))
    assert shares(counts, "fp16", largest=1.0).overflow.low == 0.5
    assert shares(counts, "fp16", largest=70_000.0).overflow == (0.5, 0.5)


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
