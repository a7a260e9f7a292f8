from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.data.dataset import Dataset, check_finite, check_fits, check_no_more, digest_of, split
from narrowcast.errors import DataError
from narrowcast.models.graph import TensorInfo

Make = Callable[..., Dataset]


def numbered(size: int, groups: np.ndarray | None = None) -> Dataset:
    values = np.arange(size, dtype=np.float32)[:, None]
    return Dataset("numbers", "0", size, lambda i: {"x": values[i]}, values[:, 0].astype(np.int64), groups)


def members(data: Dataset) -> list[int]:
    loaded = data.load(np.arange(data.size))["x"][:, 0].astype(int).tolist()
    assert data.labels is not None
    assert loaded == data.labels.tolist()
    return loaded


def test_batches_cover_every_sample_once_and_in_order() -> None:
    batches = list(numbered(10).batches(4))
    assert [len(indices) for indices, _ in batches] == [4, 4, 2]
    assert np.concatenate([feeds["x"][:, 0] for _, feeds in batches]).tolist() == list(range(10))


def test_taking_twice_keeps_samples_labels_and_groups_together() -> None:
    data = numbered(10, groups=np.arange(10) // 2).take(np.array([7, 3, 9, 0])).take(np.array([2, 0]))
    assert members(data) == [9, 7]
    assert data.groups is not None
    assert data.groups.tolist() == [4, 3]
    assert data.size == 2


@given(size=st.integers(3, 200), seed=st.integers(0, 10_000))
def test_a_split_has_three_parts_that_hold_every_sample_once(size: int, seed: int) -> None:
    parts = split(numbered(size), seed)
    sizes = [part.size for part in (parts.calibration, parts.search, parts.report)]
    assert min(sizes) >= 1
    together = members(parts.calibration) + members(parts.search) + members(parts.report)
    assert sorted(together) == list(range(size))


@given(counts=st.lists(st.integers(1, 7), min_size=3, max_size=30), seed=st.integers(0, 1000))
def test_a_split_never_tears_a_group_apart(counts: list[int], seed: int) -> None:
    groups = np.repeat(np.arange(len(counts)), counts)
    groups = np.random.default_rng(seed).permutation(groups)
    parts = split(numbered(len(groups), groups), seed)
    homes = [set(part.groups.tolist()) for part in (parts.calibration, parts.search, parts.report)]
    assert all(homes)
    assert not homes[0] & homes[1]
    assert not homes[0] & homes[2]
    assert not homes[1] & homes[2]
    assert sum(part.size for part in (parts.calibration, parts.search, parts.report)) == len(groups)


def test_a_seed_decides_the_split() -> None:
    one, again, other = (split(numbered(60), seed) for seed in (3, 3, 4))
    assert members(one.report) == members(again.report)
    assert members(one.calibration) == members(again.calibration)
    assert members(one.report) != members(other.report)


def test_a_large_split_has_the_documented_shares() -> None:
    parts = split(numbered(1000), 0)
    assert (parts.calibration.size, parts.search.size, parts.report.size) == (450, 250, 300)


@pytest.mark.parametrize("size", [1, 2])
def test_too_few_samples_leave_a_part_empty(size: int) -> None:
    with pytest.raises(DataError, match=f"numbers has {size} sample.*empty") as caught:
        split(numbered(size), 0)
    assert "at least 3" in caught.value.allowed


def test_many_samples_in_two_groups_are_too_few() -> None:
    with pytest.raises(DataError, match=r"2 group"):
        split(numbered(100, np.arange(100) % 2), 0)


def test_a_digest_tells_values_dtypes_and_shapes_apart() -> None:
    base = np.arange(6, dtype=np.float32)
    variants = [base, base.reshape(2, 3), base.astype(np.float64), base + 1, base[::-1]]
    digests = {digest_of(array) for array in variants}
    assert len(digests) == len(variants)
    assert digest_of(base.reshape(2, 3).T.copy().T) == digest_of(base.reshape(2, 3))


IMAGE = [TensorInfo("image", np.dtype(np.float32), ("batch", 3, 4, "width"))]


def test_samples_that_fit_pass(dataset_of: Make) -> None:
    check_fits(dataset_of(image=np.zeros((2, 3, 4, 9), np.float32)), IMAGE)


def test_a_missing_array_is_named_beside_what_there_is(dataset_of: Make) -> None:
    with pytest.raises(DataError, match=r"no array for the model's input 'image'.*'picture'"):
        check_fits(dataset_of(picture=np.zeros((2, 3, 4, 4), np.float32)), IMAGE)


def test_an_array_that_no_input_takes_is_named_where_nothing_else_reads_it(dataset_of: Make) -> None:
    pictures = np.zeros((2, 3, 4, 4), np.float32)
    with pytest.raises(DataError, match="test has an array 'depth'") as caught:
        check_no_more(dataset_of(image=pictures, depth=pictures), IMAGE)
    assert "'image'" in caught.value.allowed
    check_no_more(dataset_of(image=pictures), IMAGE)


def test_a_wrong_dtype_is_named_with_the_conversion(dataset_of: Make) -> None:
    with pytest.raises(DataError, match="'image' is uint8") as caught:
        check_fits(dataset_of(image=np.zeros((2, 3, 4, 4), np.uint8)), IMAGE)
    assert "astype('float32')" in caught.value.next_step


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 3, 5, 5), (2, 3, 4), (2,), (2, 3, 4, 4, 1)])
def test_a_wrong_shape_is_named_with_the_right_one(dataset_of: Make, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="has shape") as caught:
        check_fits(dataset_of(image=np.zeros(shape, np.float32)), IMAGE)
    assert str(list(shape)) in caught.value.what
    assert "3, 4, width" in caught.value.allowed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_place(bad: float) -> None:
    array = np.zeros((4, 3, 2), np.float32)
    array[2, 1, 0] = array[3, 0, 0] = bad
    with pytest.raises(DataError, match=r"'image' holds .* at \[2, 1, 0\] \(2 such values\)"):
        check_finite("npz:x.npz", "image", array)


def test_whole_numbers_are_always_finite() -> None:
    check_finite("npz:x.npz", "ids", np.array([[1, 2]], np.int64))
