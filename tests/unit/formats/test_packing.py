"""Packing has an exact inverse, and puts every bit where it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import FormatError
from narrowcast.formats import pack, unpack
from narrowcast.formats.packing import packed_size

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


@given(st.sampled_from(WIDTHS).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
def test_unpacking_gives_the_codes_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(np.array(codes, np.uint16), bits)
    assert packed.size == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(st.sampled_from(WIDTHS).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
def test_codes_are_a_stream_of_bits_lowest_first(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    stream = sum(code << (place * bits) for place, code in enumerate(codes))
    assert int.from_bytes(pack(np.array(codes, np.uint16), bits).tobytes(), "little") == stream


@given(st.lists(st.integers(0, 15)))
def test_nibbles_may_come_high_first(codes: list[int]) -> None:
    packed = pack(np.array(codes, np.uint8), 4, order="high_first")
    padded = [*codes, 0]
    assert packed.tolist() == [padded[i] << 4 | padded[i + 1] for i in range(0, len(codes), 2)]
    assert unpack(packed, 4, len(codes), order="high_first").tolist() == codes


def test_a_code_out_of_range_is_named() -> None:
    with pytest.raises(FormatError, match="up to 16"):
        pack(np.array([3, 16], np.uint8), 4)
    with pytest.raises(FormatError, match="9 bits"):
        pack(np.array([1]), 9)
    with pytest.raises(FormatError, match="high_first"):
        pack(np.array([1], np.uint8), 6, order="high_first")
    with pytest.raises(FormatError, match="middle_first"):
        pack(np.array([1], np.uint8), 4, order="middle_first")
    with pytest.raises(FormatError, match="1 bytes for 3 codes of 4 bits"):
        unpack(np.array([1], np.uint8), 4, 3)


@pytest.mark.parametrize(("packed", "count"), [([300, 1], 4), (np.zeros(4, np.int64), 4), (np.zeros(4, np.uint8), -1)])
def test_what_is_no_row_of_bytes_is_not_unpacked(packed: object, count: int) -> None:
    with pytest.raises(FormatError, match=f"{count} codes from an array of"):
        unpack(packed, 4, count)  # type: ignore[arg-type]
