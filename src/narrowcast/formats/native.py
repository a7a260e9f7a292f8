"""torch's own casts, where somebody has loaded torch and numba is missing: right but for what overflows or is NaN."""

from __future__ import annotations

from typing import Any

import numpy as np

from narrowcast.formats.arrays import code_dtype, torch_loaded
from narrowcast.formats.kinds import ElementFormat, Format
from narrowcast.formats.table import ELEMENTS

__all__ = ["encode_natively", "torch_codes"]

_TORCH = {
    ELEMENTS[name]: dtype
    for name, dtype in {"bf16": "bfloat16", "fp16": "float16", "e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2"}.items()
}


def encode_natively(x: np.ndarray, format: Format, out: np.ndarray) -> bool:
    """Write the codes of float32 numbers, rounded to nearest even, if torch is there and has the format.

    Codes of the largest magnitude and beyond are the caller's to mend: versions of torch differ in them.

    Returns:
        Whether anything was written.
    """
    torch = torch_loaded()
    if torch is None or format not in _TORCH or not x.flags.writeable:  # torch warns of arrays that are not
        return False
    codes = torch.from_numpy(out).view(getattr(torch, _TORCH[format]))
    codes.copy_(torch.from_numpy(x))
    return True


def torch_codes(x: Any, format: ElementFormat) -> Any:
    """Return what torch itself makes of a float32 tensor, as codes; None for anything else.

    This is what ``convention="torch"`` asks for, to the codes of NaN.
    """
    torch = torch_loaded()
    if torch is None or format not in _TORCH or not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        return None
    return x.detach().to(getattr(torch, _TORCH[format])).view(getattr(torch, code_dtype(format.bits)))
