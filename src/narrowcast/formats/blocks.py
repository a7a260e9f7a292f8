"""Block formats as data: which elements, how many share a scale, and in which format the scale is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from narrowcast.errors import FormatError
from narrowcast.formats.checks import check_words, truth, whole
from narrowcast.formats.kinds import ElementFormat, Format

__all__ = ["BlockFormat"]


@dataclass(frozen=True)
class BlockFormat:
    """Elements in blocks along one axis, each block with a scale of its own.

    Args:
        name: What errors and tables call it.
        element: The elements' format.
        block: Elements that share a scale.
        scale: The scales' format.
        tensor_scale: Whether one more scale, in FP32, is shared by the whole tensor (NVFP4).

    Raises:
        FormatError: A block of less than one element, or a scale that cannot hold a positive number.
    """

    name: str
    element: ElementFormat
    block: int
    scale: Format
    tensor_scale: bool = False
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_words({"name": self.name})
        object.__setattr__(self, "block", whole(f"block of {self.name}", self.block, least=1))
        truth("tensor_scale", self.tensor_scale)
        if not isinstance(self.element, ElementFormat):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise FormatError(f"element = {self.element!r} of {self.name}", allowed="an element format: get('e2m1')")
        if not isinstance(self.scale, Format):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise FormatError(f"scale = {self.scale!r} of {self.name}", allowed="a float: get('e8m0')")

    @property
    def bits_per_element(self) -> float:
        """Bits that an element takes with its share of the block's scale."""
        return self.element.bits + self.scale.bits / self.block
