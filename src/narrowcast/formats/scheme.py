"""How a tensor is quantised, as data: what :func:`narrowcast.formats.quantize` was asked, resolved and checked."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from narrowcast.errors import FormatError, choices
from narrowcast.formats.blocks import BlockFormat
from narrowcast.formats.checks import check_words, real, truth, whole
from narrowcast.formats.granularity import Granularity, PerBlock, PerChannel, PerTensor
from narrowcast.formats.kinds import Codebook, ElementFormat, Format, Integer
from narrowcast.formats.table import ELEMENTS, get

__all__ = ["RANGES", "SCALE_RULES", "Scheme"]

RANGES = ("minmax", "percentile", "mse")
SCALE_RULES = ("floor", "ceil", "even", "round_up")
DOUBLE_BLOCK = 256
_NF_BLOCK = 64


@dataclass(frozen=True)
class Scheme:
    """Elements, who shares a scale, and how the scale is chosen and kept.

    Args:
        element: The elements' format.
        granularity: Which elements share a scale.
        scale: The scales' format.
        tensor_scale: Whether one more FP32 scale is shared by the whole tensor.
        symmetric: Whether zero is code zero; else every row has a zero point (integers only).
        range: ``minmax``, ``percentile`` or ``mse``.
        percentile: Share of a row's elements, in percent, that ``percentile`` covers.
        scale_rule: How a power-of-two scale follows from the largest magnitude: ``floor``, ``ceil``, ``even`` or
            ``round_up``.
        double_quant: Whether the scales are themselves quantised: less their mean, to int8 in blocks of 256.
        pad: Whether a last, short block was filled up with zeros.
        rounding: How elements are rounded.
        name: The block format's name, or the element's.
    """

    element: ElementFormat
    granularity: Granularity
    scale: Format
    tensor_scale: bool = False
    symmetric: bool = True
    range: str = "minmax"
    percentile: float = 99.99
    scale_rule: str = "floor"
    double_quant: bool = False
    pad: bool = False
    rounding: str = "nearest_even"
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.element.name)
        if self.range not in RANGES:
            raise FormatError(f"unknown range {self.range!r}", allowed=choices(self.range, RANGES))
        if self.scale_rule not in SCALE_RULES:
            raise FormatError(f"unknown scale rule {self.scale_rule!r}", allowed=choices(self.scale_rule, SCALE_RULES))
        if not 0 < self.percentile <= 100:
            raise FormatError(f"percentile = {self.percentile}", allowed="more than 0, up to 100")
        if self.element.bits > 16:
            raise FormatError(f"{self.element.name} elements with a scale", allowed="formats of up to 16 bits")
        if not self.symmetric and not isinstance(self.element, Integer):
            raise FormatError(f"symmetric=False with {self.element.name}", allowed="integers")
        if isinstance(self.element, Format) and not self.element.has_zero:
            raise FormatError(f"{self.element.name} elements, which have no zero", allowed="formats with a zero")
        if self.scale.bits not in (8, 16, 32):
            raise FormatError(f"{self.scale.name} scales", allowed="floating-point formats of 8, 16 or 32 bits")
        if self.double_quant and self.scale != ELEMENTS["fp32"]:
            raise FormatError(f"double_quant with {self.scale.name} scales", allowed="FP32 scales")

    @staticmethod
    def of(
        format: str | ElementFormat | BlockFormat,
        *,
        block: int | None,
        axis: int,
        granularity: Granularity | None,
        scale: str | ElementFormat | BlockFormat | None = None,
        **options: Any,
    ) -> Scheme:
        """Return the scheme of a format with the caller's options over its defaults.

        Raises:
            FormatError: Options of a wrong type, or that contradict the format or each other.
        """
        if not isinstance(granularity, Granularity | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise FormatError(
                f"granularity = {granularity!r:.100}", allowed="PerTensor(), PerChannel(axis), PerBlock(size)"
            )
        return Scheme._of(
            get(format),
            block=None if block is None else whole("block", block),
            axis=whole("axis", axis),
            granularity=granularity,
            scale=None if scale is None else get(scale),
            **_checked(options),
        )

    @staticmethod
    @lru_cache(maxsize=256)
    def _of(
        found: ElementFormat | BlockFormat,
        *,
        block: int | None,
        axis: int,
        granularity: Granularity | None,
        scale: ElementFormat | BlockFormat | None,
        **options: Any,
    ) -> Scheme:
        if block is not None and granularity is not None:
            raise FormatError(f"block = {block} and granularity = {granularity}", allowed="one of the two")
        if isinstance(found, BlockFormat):
            if granularity is not None:
                raise FormatError(f"granularity = {granularity} with {found.name}", allowed="axis, and block")
            if scale is not None:
                raise FormatError(f"scale = {scale.name!r} with {found.name}, which says {found.scale.name}")
            where = PerBlock(found.block if block is None else block, axis)
            return Scheme(found.element, where, found.scale, found.tensor_scale, name=found.name, **options)
        if block is None and granularity is None and isinstance(found, Codebook):
            block = _NF_BLOCK
        if axis != -1 and block is None:
            raise FormatError(
                f"axis = {axis} without blocks",
                allowed="axis with block; or granularity=PerChannel(axis) for one scale per channel",
            )
        if granularity is None:
            granularity = PerTensor() if block is None else PerBlock(block, axis)
        kept = ELEMENTS["fp32"] if scale is None else scale
        if not isinstance(kept, Format):
            raise FormatError(f"{kept.name} scales", allowed="floating-point formats of 8, 16 or 32 bits")
        return Scheme(found, granularity, kept, **options)

    def to_json(self) -> str:
        """Return the scheme as JSON, with its formats spelled out: a reader needs no table."""
        plain: dict[str, Any] = {
            key: value for key, value in vars(self).items() if isinstance(value, str | bool | float)
        }
        plain["element"] = _described(self.element)
        plain["scale"] = _described(self.scale)
        plain["granularity"] = _described(self.granularity)
        return json.dumps(plain, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Scheme:
        """Return the scheme that :meth:`to_json` wrote.

        Raises:
            FormatError: Text that it did not write.
        """
        try:
            plain = json.loads(text)
            parts = {key: _built(plain.pop(key)) for key in ("element", "scale", "granularity")}
            return Scheme(**parts, **plain)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(
                f"no quantisation scheme: {error}", next_step="was the file written by narrowcast?"
            ) from None


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Return a scheme's options, each of its type."""
    checked = dict(options)
    for name in ("symmetric", "double_quant", "pad"):
        if name in options:
            truth(name, options[name])
    if "percentile" in options:
        checked["percentile"] = real("percentile", options["percentile"])
    check_words({name: options[name] for name in ("range", "scale_rule", "rounding") if name in options})
    return checked


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Format, Integer, Codebook, PerTensor, PerChannel, PerBlock)}


def _described(value: Any) -> dict[str, Any]:
    return {"kind": type(value).__name__} | {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _built(plain: dict[str, Any]) -> Any:
    kind = _KINDS[plain.pop("kind")]
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()})
