"""torch's own casts, where somebody has loaded torch: as quick as memory, and right but for what overflows or is NaN."""

from __future__ import annotations

import numpy as np

from narrowcast.formats.arrays import torch_loaded
from narrowcast.formats.kinds import Format

__all__ = ["decode_natively", "encode_natively"]

_TORCH = {"bf16": "bfloat16", "fp16": "float16", "e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_DECODES = ("bf16", "fp16")  # a look-up is quicker for eight bits


def encode_natively(x: np.ndarray, format: Format, out: np.ndarray) -> bool:
    """Write the codes of float32 numbers, rounded to nearest even, if torch is there and has the format.

    Codes of the largest magnitude and beyond are the caller's to mend: versions of torch differ in them.

    Returns:
        Whether anything was written.
    """
    torch = torch_loaded()
    if torch is None or format.name not in _TORCH or not x.flags.writeable:  # torch warns of arrays that are not
        return False
    codes = torch.from_numpy(out).view(getattr(torch, _TORCH[format.name]))
    codes.copy_(torch.from_numpy(x))
    return True


def decode_natively(codes: np.ndarray, format: Format, out: np.ndarray) -> bool:
    """Write the float32 values of codes, if torch is there and is quicker than a look-up; return whether."""
    torch = torch_loaded()
    if torch is None or format.name not in _DECODES or out.dtype != np.float32 or not codes.flags.writeable:
        return False
    torch.from_numpy(out).copy_(torch.from_numpy(codes).view(getattr(torch, _TORCH[format.name])))
    return True
