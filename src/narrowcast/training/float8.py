"""FP8 products through torchao: which linear layers, with which scales."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from narrowcast.errors import FormatError, ModelError, RuntimeMissingError
from narrowcast.training.overrides import Overrides, format_of

if TYPE_CHECKING:
    from torchao.float8 import Float8LinearConfig

__all__ = ["Float8", "convert"]

_log = logging.getLogger(__name__)
_ALIGNED = 16  # bytes that rows of FP8 operands are aligned to (cuBLAS, torch._scaled_mm)


@dataclass(frozen=True)
class Float8:
    """How linear layers multiply in FP8 (Micikevicius et al., 2022): E4M3 forward.

    Args:
        scaling: ``tensorwise`` (one scale for a tensor: the fastest) or ``rowwise`` (one for each row: exacter, and scales
            are powers of two).
        gradients: What gradients of outputs are cast to: ``e5m2`` or ``e4m3``; with None e5m2 for tensorwise, e4m3 for
            rowwise scaling, which are torchao's recipes.
        keep_ends: Whether the first and the last linear layer stay in BF16.
        emulate: Whether to compute with FP8 numbers on a device that cannot multiply them: slow, for tests.

    Raises:
        FormatError: An unknown scaling or format.
    """

    scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    gradients: Literal["e5m2", "e4m3"] | None = None
    keep_ends: bool = True
    emulate: bool = False

    def __post_init__(self) -> None:
        if self.scaling not in ("tensorwise", "rowwise"):
            raise FormatError(f"FP8 scaling {self.scaling!r}", allowed="tensorwise, rowwise")
        if self.gradients not in (None, "e5m2", "e4m3"):
            raise FormatError(f"FP8 gradients in {self.gradients!r}", allowed="e5m2, e4m3")


def convert(module: nn.Module, float8: Float8, overrides: Overrides) -> None:
    """Have linear layers multiply in FP8, in place; their parameters stay the same objects.

    Layers that an override puts into another format stay as they are, and so do those with a size that is no multiple of
    16 (which FP8 products need) and, unless an override says ``fp8``, the first and the last one.

    Raises:
        ModelError: No linear layer is left to convert.
        RuntimeMissingError: torchao is not installed.
    """
    try:
        from torchao.float8 import convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
    except ImportError as error:
        raise RuntimeMissingError(
            "fp8-mixed needs torchao, which is not installed", next_step="install it with: pip install torchao"
        ) from error
    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    names = list(linear)
    ends = {names[0], names[-1]} if linear and float8.keep_ends else set[str]()
    chosen: set[str] = set()
    odd: list[str] = []
    for name, part in linear.items():
        format = format_of(name, overrides)
        if type(part) is not nn.Linear or format not in (None, "fp8") or (name in ends and format is None):
            continue
        (chosen.add if part.in_features % _ALIGNED == part.out_features % _ALIGNED == 0 else odd.append)(name)
    if odd:
        _log.info("kept in BF16, as a size is no multiple of %d: %s", _ALIGNED, ", ".join(odd))
    if not chosen and not any(isinstance(part, Float8Linear) for part in linear.values()):
        raise ModelError(
            f"fp8-mixed finds no linear layer to convert among {len(linear)}",
            allowed=f"linear layers between the first and the last, with sizes that are multiples of {_ALIGNED}",
            next_step="use bf16-mixed",
        )
    convert_to_float8_training(module, config=_config(float8), module_filter_fn=lambda _part, name: name in chosen)


def _config(float8: Float8) -> Float8LinearConfig:
    from torchao.float8 import CastConfig, Float8LinearConfig
    from torchao.float8.config import e4m3_dtype, e5m2_dtype

    config = Float8LinearConfig.from_recipe_name(float8.scaling)
    if float8.gradients is not None:
        wanted = e4m3_dtype if float8.gradients == "e4m3" else e5m2_dtype
        cast = CastConfig(scaling_granularity=config.cast_config_grad_output.scaling_granularity, target_dtype=wanted)
        config = replace(config, cast_config_grad_output=cast, cast_config_grad_output_for_grad_weight=cast)
    return replace(config, emulate=float8.emulate)
