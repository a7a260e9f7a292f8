"""FP32 to FP16, BF16 and FP8: all 2**32 inputs, by ``make exhaustive``; one in 4,099 of them in every run of the tests.

Numbers are compared with ml_dtypes and torch (FP16 with torch, and with NumPy in the sample: all of them take it minutes).
NaN is compared with our own rule, which no library has in full: the sign is kept, the quiet bit set, the payload cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from format_engines import ENGINES, running_on
from format_oracles import ml_codes, torch_codes
from format_values import FLOATS, assert_same

from narrowcast.formats import codec
from narrowcast.formats.kinds import Nan

CHUNK = 1 << 22
SAMPLE = 4099  # a prime: every exponent, and all patterns of lower digits
# format, oracle, and the choices that make ours do as the oracle does
CASES = [
    ("fp16", "torch", {}),
    ("bf16", "ml_dtypes", {}),
    ("e4m3fn", "ml_dtypes", {"overflow": "ieee"}),
    ("e4m3fn", "torch", {"overflow": "clamp"}),
    ("e5m2", "ml_dtypes", {}),
    ("e5m2", "torch", {}),
]
WHOLE = [
    row
    for row in CASES
    if row[:2] in {("fp16", "torch"), ("bf16", "ml_dtypes"), ("e4m3fn", "torch"), ("e5m2", "ml_dtypes")}
]


def inputs(step: int) -> Iterator[np.ndarray]:
    """Yield every ``step``-th float32 there is, by its bits, in pieces."""
    for start in range(0, 1 << 32, CHUNK * step):
        words = np.arange(start, min(start + CHUNK * step, 1 << 32), step, dtype=np.uint64)
        yield words.astype(np.uint32).view(np.float32)


def nan_codes(words: np.ndarray, name: str) -> np.ndarray:
    """Return the codes of NaN inputs by our rule, from the bits of float32."""
    format = FLOATS[name]
    sign = (words >> np.uint32(31)).astype(np.int64) * format.sign_bit
    if format.nan is Nan.ALL_ONES:
        return sign | format.magnitude_mask
    payload = (words & np.uint32(0x7FFFFF)).astype(np.int64) >> (23 - format.mantissa_bits)
    return sign | format.infinity_code | payload | 1 << (format.mantissa_bits - 1)


def check(name: str, oracle: str, choices: dict[str, str], step: int) -> None:
    expected = torch_codes if oracle == "torch" else ml_codes
    seen = 0
    for x in inputs(step):
        wanted = expected(x, name)
        is_nan = np.isnan(x)
        if is_nan.any():
            wanted = wanted.copy()
            wanted[is_nan] = nan_codes(x.view(np.uint32)[is_nan], name)
        for engine in ENGINES:
            if engine == oracle:
                continue
            with running_on(engine):
                found = codec.encode(x, name, **choices)
            if not np.array_equal(found, wanted):
                assert_same(found, wanted, x)
        seen += len(x)
    assert seen == -(-(1 << 32) // step)


@pytest.mark.parametrize(("name", "oracle", "choices"), CASES, ids=[f"{name}-{oracle}" for name, oracle, _ in CASES])
def test_one_in_4099_inputs(name: str, oracle: str, choices: dict[str, str]) -> None:
    check(name, oracle, choices, SAMPLE)


def test_one_in_4099_inputs_to_fp16_in_numpy() -> None:
    check("fp16", "numpy", {}, SAMPLE)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "oracle", "choices"), WHOLE, ids=[row[0] for row in WHOLE])
def test_all_inputs(name: str, oracle: str, choices: dict[str, str]) -> None:
    check(name, oracle, choices, 1)
