"""Every named format: one literal each. Add a line and it is encoded, decoded, tabulated and tested."""

from __future__ import annotations

import re
from functools import lru_cache

from narrowcast.errors import FormatError, choices
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer, Nan
from narrowcast.formats.normal_float import normal_float

__all__ = ["ALIASES", "BLOCKS", "ELEMENTS", "element", "get", "names"]

_IEEE = "IEEE 754-2019, section 3.6"
_OFP8 = "OCP OFP8 1.0, section 5"
_MX = "OCP Microscaling Formats 1.0, section 5"
_FNUZ = "Noune et al., 8-bit Numerical Formats for Deep Neural Networks, 2022"
_QLORA = "Dettmers et al., QLoRA, 2023, section 3"
_8_BIT_IEEE = "IEEE 754's rules at 8 bits"

_E5M2 = Format(5, 2, name="e5m2", source=_OFP8)
_E4M3FN = Format(4, 3, name="e4m3fn", nan=Nan.ALL_ONES, source=_OFP8)
_E3M2 = Format(3, 2, name="e3m2", nan=Nan.NONE, source=_MX)
_E2M3 = Format(2, 3, name="e2m3", nan=Nan.NONE, source=_MX)
_E2M1 = Format(2, 1, name="e2m1", nan=Nan.NONE, source=_MX)
_E8M0 = Format(8, 0, 127, name="e8m0", signed=False, nan=Nan.ALL_ONES, has_zero=False, source=_MX)
_MXINT8 = Integer(8, fraction_bits=6, name="mxint8_element", source=_MX)

ELEMENTS: dict[str, ElementFormat] = {
    item.name: item
    for item in (
        Format(11, 52, name="fp64", source=_IEEE),
        Format(8, 23, name="fp32", source=_IEEE),
        Format(8, 10, name="tf32", source="NVIDIA A100 Tensor Core GPU Architecture, 2020"),
        Format(5, 10, name="fp16", source=_IEEE),
        Format(8, 7, name="bf16", source="Intel, BFLOAT16 Hardware Numerics Definition, 2018"),
        _E5M2,
        _E4M3FN,
        Format(4, 3, name="e4m3", source=_8_BIT_IEEE),
        Format(3, 4, name="e3m4", source=_8_BIT_IEEE),
        Format(4, 3, 8, name="e4m3fnuz", nan=Nan.NEGATIVE_ZERO, source=_FNUZ),
        Format(5, 2, 16, name="e5m2fnuz", nan=Nan.NEGATIVE_ZERO, source=_FNUZ),
        Format(4, 3, 11, name="e4m3b11fnuz", nan=Nan.NEGATIVE_ZERO, source="Sun et al., Hybrid 8-bit Training, 2019"),
        _E3M2,
        _E2M3,
        _E2M1,
        _E8M0,
        *(Integer(bits, signed) for signed in (True, False) for bits in (2, 3, 4, 8, 16)),
        *(Codebook(f"nf{bits}", normal_float(bits), _QLORA) for bits in (4, 3, 2)),
    )
}

BLOCKS: dict[str, BlockFormat] = {
    item.name: item
    for item in (
        BlockFormat("mxfp8_e4m3", _E4M3FN, 32, _E8M0, source=_MX),
        BlockFormat("mxfp8_e5m2", _E5M2, 32, _E8M0, source=_MX),
        BlockFormat("mxfp6_e2m3", _E2M3, 32, _E8M0, source=_MX),
        BlockFormat("mxfp6_e3m2", _E3M2, 32, _E8M0, source=_MX),
        BlockFormat("mxfp4", _E2M1, 32, _E8M0, source=_MX),
        BlockFormat("mxint8", _MXINT8, 32, _E8M0, source=_MX),
        BlockFormat("nvfp4", _E2M1, 16, _E4M3FN, tensor_scale=True, source="NVIDIA, Introducing NVFP4, 2025"),
    )
}

# What people type, after lower-casing and dropping "_", "-" and a leading "torch." or "np.".
ALIASES: dict[str, str] = {
    "float64": "fp64",
    "f64": "fp64",
    "double": "fp64",
    "float32": "fp32",
    "f32": "fp32",
    "float": "fp32",
    "single": "fp32",
    "tensorfloat32": "tf32",
    "float16": "fp16",
    "f16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "bfloat": "bf16",
    "brainfloat16": "bf16",
    "fp8e5m2": "e5m2",
    "f8e5m2": "e5m2",
    "float8e5m2": "e5m2",
    "fp8": "e4m3fn",
    "fp8e4m3": "e4m3fn",
    "fp8e4m3fn": "e4m3fn",
    "f8e4m3fn": "e4m3fn",
    "float8e4m3fn": "e4m3fn",
    "float8e4m3": "e4m3",
    "float8e3m4": "e3m4",
    "fp8e3m4": "e3m4",
    "fp8e4m3fnuz": "e4m3fnuz",
    "float8e4m3fnuz": "e4m3fnuz",
    "fp8e5m2fnuz": "e5m2fnuz",
    "float8e5m2fnuz": "e5m2fnuz",
    "float8e4m3b11fnuz": "e4m3b11fnuz",
    "e4m3b11": "e4m3b11fnuz",
    "fp6e3m2": "e3m2",
    "float6e3m2fn": "e3m2",
    "e3m2fn": "e3m2",
    "fp6e2m3": "e2m3",
    "float6e2m3fn": "e2m3",
    "e2m3fn": "e2m3",
    "fp4": "e2m1",
    "fp4e2m1": "e2m1",
    "float4e2m1fn": "e2m1",
    "e2m1fn": "e2m1",
    "float8e8m0fnu": "e8m0",
    "e8m0fnu": "e8m0",
    "ue8m0": "e8m0",
    "fp8e8m0": "e8m0",
    **{f"{sign[0]}{bits}": f"{sign}{bits}" for sign in ("int", "uint") for bits in (2, 3, 4, 8, 16)},
    "f8e4m3": "e4m3fn",  # this and the next are safetensors' names
    "f8e8m0": "e8m0",
    "f8e4m3fnuz": "e4m3fnuz",
    "f8e5m2fnuz": "e5m2fnuz",
    "f6e2m3": "e2m3",
    "f6e3m2": "e3m2",
    "f4": "e2m1",
    "normalfloat4": "nf4",
    "mxfp8": "mxfp8_e4m3",
    "mxfp6": "mxfp6_e2m3",
    "mxfp4e2m1": "mxfp4",
    "fp4nv": "nvfp4",
}

_NEXT = "run `narrowcast formats` for the table, or build one: Format(exponent_bits, mantissa_bits, bias)"
_PLAIN = {re.sub("[_-]", "", name): name for name in (*ELEMENTS, *BLOCKS)}


def get(name: str | ElementFormat | BlockFormat) -> ElementFormat | BlockFormat:
    """Return the format of that name or alias; a format object is returned as it is.

    Raises:
        FormatError: No format has that name, and the nearest one is suggested; or what is neither name nor format.
    """
    if isinstance(name, ElementFormat | BlockFormat):
        return name
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FormatError(
            f"{name!r} is no number format", allowed="a name such as 'bf16', or a format object", next_step=_NEXT
        )
    return _named(name)


@lru_cache(maxsize=256)
def _named(name: str) -> ElementFormat | BlockFormat:
    plain = re.sub("[_-]", "", name.strip().lower()).removeprefix("torch.").removeprefix("np.").removeprefix("numpy.")
    known = _PLAIN.get(plain) or ALIASES.get(plain)
    if known is None:
        raise FormatError(
            f"unknown number format {name!r}",
            allowed=choices(plain, [*ELEMENTS, *BLOCKS], nearest=3),
            next_step=_NEXT,
        )
    return ELEMENTS.get(known) or BLOCKS[known]


def names() -> list[str]:
    """Return the names of all formats, element formats first."""
    return [*ELEMENTS, *BLOCKS]


def element(name: str | ElementFormat | BlockFormat) -> ElementFormat:
    """Return the element format of that name.

    Raises:
        FormatError: No such format, or a block format, whose elements mean nothing without their scales.
    """
    found = get(name)
    if isinstance(found, BlockFormat):
        raise FormatError(
            f"{found.name} is a block format: one number alone has no code in it",
            allowed=f"an element format, such as {found.element.name}",
            next_step=f"quantize(x, {found.name!r}) scales and encodes whole blocks",
        )
    return found
