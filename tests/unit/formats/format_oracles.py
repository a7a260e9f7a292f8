"""Which other libraries have which format, and under which name."""

from __future__ import annotations

import gfloat
import ml_dtypes
import numpy as np
import torch

from narrowcast.formats.kinds import Format, Nan

# name: dtype, whose codes fill the low bits of its bytes
ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
ML_INTEGERS = {"int2": ml_dtypes.int2, "int4": ml_dtypes.int4, "uint2": ml_dtypes.uint2, "uint4": ml_dtypes.uint4}
NUMPY = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
TORCH = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e5m2": torch.float8_e5m2,
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "e8m0": torch.float8_e8m0fnu,
}
UNSIGNED = {8: "uint8", 16: "uint16", 32: "uint32", 64: "uint64"}
ROUND_MODES = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}


def in_gfloat(format: object) -> bool:
    """Return whether gfloat can say what the format is: none without zero there, unless without significand too."""
    return isinstance(format, Format) and (format.has_zero or format.mantissa_bits == 0)


def gfloat_info(format: Format) -> gfloat.FormatInfo:
    """Return the format in gfloat's terms."""
    high_nans = {Nan.IEEE: 2**format.mantissa_bits - 1, Nan.ALL_ONES: 1}
    return gfloat.FormatInfo(
        name=format.name,
        k=format.bits,
        precision=format.mantissa_bits + 1,
        bias=format.bias,
        has_nz=format.has_negative_zero,
        domain=gfloat.Domain.Extended if format.has_inf else gfloat.Domain.Finite,
        num_high_nans=high_nans.get(format.nan, 0),
        has_subnormals=format.has_zero,
        is_signed=format.signed,
        is_twos_complement=False,
    )


def ml_codes(x: np.ndarray, name: str) -> np.ndarray:
    """Return the codes that ml_dtypes (or NumPy) gives to ``x``."""
    dtype = np.dtype((ML_DTYPES | NUMPY)[name])
    with np.errstate(all="ignore"):
        return x.astype(dtype).view(UNSIGNED[8 * dtype.itemsize])


def torch_codes(x: np.ndarray, name: str) -> np.ndarray:
    """Return the codes that torch gives to ``x`` on the CPU."""
    converted = torch.from_numpy(np.ascontiguousarray(x)).to(TORCH[name])
    return converted.view(getattr(torch, UNSIGNED[8 * converted.element_size()])).numpy()
