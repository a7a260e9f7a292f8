"""Arrays that are read sample by sample are those that NumPy reads whole."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.data import rows as reader
from narrowcast.data.dataset import check_finite, digest_of
from narrowcast.data.loaders import load_data, read_npz
from narrowcast.data.rows import Rows, blocks, open_rows
from narrowcast.errors import DataError
from narrowcast.models.graph import Graph
from narrowcast.models.reference import Model, ModelRef

ARRAYS: dict[str, Any] = {
    "floats": np.arange(60, dtype=np.float32).reshape(10, 3, 2),
    "halves": np.linspace(0, 1, 10, dtype=np.float16),
    "numbers": np.arange(10, dtype=np.int64)[:, None],
    "flags": np.arange(10) % 3 == 0,
    "words": np.array([f"word {number}" for number in range(10)]),
    "big endian": np.arange(10, dtype=">f8"),
    "no samples": np.zeros((0, 4), np.float32),
    "no values": np.zeros((4, 0), np.float32),
    "one number": np.float32(3),
    "by columns": np.asfortranarray(np.arange(20.0).reshape(4, 5)),
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "data.npz"
    np.savez(path, **ARRAYS)
    return path


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_rows_is_the_array(archive: Path, name: str) -> None:
    found, expected = open_rows(archive)[name], np.asarray(ARRAYS[name])
    assert isinstance(found, Rows) == (name not in ("one number", "by columns"))
    assert (found.dtype, found.shape, found.ndim) == (expected.dtype, expected.shape, expected.ndim)
    assert digest_of(found) == digest_of(expected)
    if isinstance(found, Rows):
        np.testing.assert_array_equal(found[:], expected)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_any_rows_come_in_the_order_they_are_asked_for(archive: Path, wanted: list[int]) -> None:
    indices = np.array(wanted, np.int64)
    rows = open_rows(archive)["floats"]
    assert isinstance(rows, Rows)
    np.testing.assert_array_equal(rows[indices], ARRAYS["floats"][indices])


@pytest.mark.parametrize("size", [1, 24, 60, 1 << 20])
def test_blocks_cover_every_row_once(archive: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(reader, "BLOCK", size)
    for name, array in open_rows(archive).items():
        found = [*blocks(array)]
        if array.ndim:
            assert [start for start, _ in found] == [sum(len(b) for _, b in found[:i]) for i in range(len(found))]
        assert sum(block.size for _, block in found) == np.asarray(ARRAYS[name]).size
        assert digest_of(array) == digest_of(np.asarray(ARRAYS[name]))


def test_compressed_arrays_are_read_whole(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "small.npz", **ARRAYS)
    found = open_rows(tmp_path / "small.npz")
    assert not any(isinstance(array, Rows) for array in found.values())
    assert {name: digest_of(array) for name, array in found.items()} == {
        name: digest_of(array) for name, array in read_npz(tmp_path / "small.npz").items()
    }


def test_the_place_of_a_bad_value_counts_from_the_first_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK", 16)
    values = np.zeros((9, 2), np.float32)
    values[5, 1] = values[7, 0] = np.nan
    np.savez(tmp_path / "nan.npz", x=values)
    with pytest.raises(DataError, match=r"'x' holds nan at \[5, 1\] \(2 such values\)"):
        check_finite("npz:nan.npz", "x", open_rows(tmp_path / "nan.npz")["x"])


def test_a_changed_byte_is_found_before_anything_is_read(archive: Path, tmp_path: Path, linear: Model) -> None:
    whole = archive.read_bytes()
    place = whole.index(ARRAYS["floats"].tobytes()) + 5
    (tmp_path / "bad.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError, match="Bad CRC-32"):
        load_data(f"npz:{tmp_path}/bad.npz", linear)


def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "shrinks.npz", x=np.zeros((1000, 100)))
    rows = open_rows(tmp_path / "shrinks.npz")["x"]
    (tmp_path / "shrinks.npz").write_bytes((tmp_path / "shrinks.npz").read_bytes()[:5000])
    with pytest.raises(DataError, match=r"shrinks\.npz ends before sample 999 does"):
        rows[990:]


@pytest.fixture
def linear() -> Model:
    """A model that takes ``x``, FP32 ``[N, 4096]``."""
    from onnx import TensorProto, helper

    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4096]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "linear", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return Model(ModelRef("onnx", "linear.onnx"), Graph.from_model(model), b"", "0")


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path, linear: Model) -> None:
    peaks: list[int] = []
    for samples in (2_000, 6_000):  # 33 and 98 MB
        np.savez(tmp_path / "x.npz", x=np.ones((samples, 4096), np.float32))
        tracemalloc.start()
        data = load_data(f"npz:{tmp_path}/x.npz", linear)
        for _, batch in data.batches(8):
            assert batch["x"].shape[1:] == (4096,)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
