"""Every number format of deep learning, bit-exact, on NumPy arrays and torch tensors.

>>> import narrowcast.formats as nf
>>> nf.get("e4m3fn").max
448.0
>>> nf.encode([0.1, 1000.0], "e4m3fn")
array([ 29, 126], dtype=uint8)
>>> nf.decode([29, 126], "e4m3fn")
array([1.015625e-01, 4.480000e+02])
>>> nf.cast(1 + 2**-8 + 2**-40, "bf16")  # rounded once
array(1.0078125)

It depends on NumPy alone; torch is used where the caller's arrays are torch's. Names are found when they are first asked for,
so that the scalar reference (``narrowcast.formats.reference``) loads without NumPy too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowcast.formats.analysis import ErrorReport, error
    from narrowcast.formats.blocks import BlockFormat
    from narrowcast.formats.codec import cast, decode, encode
    from narrowcast.formats.granularity import Granularity, PerBlock, PerChannel, PerTensor
    from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
    from narrowcast.formats.packing import pack, unpack
    from narrowcast.formats.quantized import quantize
    from narrowcast.formats.rules import Below, NanInput, Overflow, Rounding
    from narrowcast.formats.scheme import Scheme
    from narrowcast.formats.studies import BlockCost, block_costs, four_bit_errors, sample
    from narrowcast.formats.table import get, names
    from narrowcast.formats.tensor import QuantizedTensor, load, save

__all__ = [
    "Below",
    "BlockCost",
    "BlockFormat",
    "Codebook",
    "ElementFormat",
    "ErrorReport",
    "Format",
    "Granularity",
    "Integer",
    "Nan",
    "NanInput",
    "Overflow",
    "PerBlock",
    "PerChannel",
    "PerTensor",
    "QuantizedTensor",
    "Rounding",
    "Scheme",
    "block_costs",
    "cast",
    "decode",
    "encode",
    "error",
    "four_bit_errors",
    "get",
    "load",
    "names",
    "pack",
    "quantize",
    "sample",
    "save",
    "unpack",
]

_MODULES = {
    "analysis": "ErrorReport error",
    "blocks": "BlockFormat",
    "codec": "cast decode encode",
    "granularity": "Granularity PerBlock PerChannel PerTensor",
    "kinds": "Codebook ElementFormat Format Integer Nan",
    "packing": "pack unpack",
    "quantized": "quantize",
    "rules": "Below NanInput Overflow Rounding",
    "scheme": "Scheme",
    "studies": "BlockCost block_costs four_bit_errors sample",
    "table": "get names",
    "tensor": "QuantizedTensor load save",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'narrowcast.formats' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"narrowcast.formats.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
