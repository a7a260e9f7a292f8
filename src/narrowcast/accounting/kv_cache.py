"""Bytes that a language model keeps of past tokens, as a function of tokens and batch.

>>> mistral = KVCache.uniform(32, heads=8, width=128, window=4096)
>>> mistral.bytes(1000), mistral.bytes(10_000) == mistral.bytes(4096)
(131072000, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from narrowcast import formats
from narrowcast.errors import FormatError, ModelError
from narrowcast.formats import BlockFormat

__all__ = ["CacheFormat", "CachedLayer", "KVCache", "kv_cache"]


@dataclass(frozen=True)
class CacheFormat:
    """How the numbers of a cache are stored.

    Args:
        name: A format of :mod:`narrowcast.formats`: ``bf16``, ``e4m3fn``, ``int8``, ``int4``, ``mxfp8_e4m3`` ...
        group: Numbers of a vector that share a scale; 0 for scales of whole tensors, whose bytes are left out. A block
            format says its own.
        scale: The scales' format; a block format says its own.
        zero_point: Whether each group keeps a zero point too, in as many bits as an element.

    Raises:
        FormatError: A format is unknown, or the group is negative.
    """

    name: str = "bf16"
    group: int = 0
    scale: str = "fp16"
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.group < 0:
            raise FormatError(f"group = {self.group} of a cache", allowed="0 (scales of whole tensors) or more")
        found = formats.get(self.name)
        if isinstance(found, BlockFormat) and self.group not in (0, found.block):
            raise FormatError(f"group = {self.group} with {self.name}, whose blocks have {found.block} elements")
        _ = self._bits

    @cached_property
    def _bits(self) -> tuple[int, int, int]:
        """Bits of an element, elements of a group, and bits that a group adds."""
        found = formats.get(self.name)
        if isinstance(found, BlockFormat):
            return found.element.bits, found.block, found.scale.bits
        scale = formats.get(self.scale)
        if isinstance(scale, BlockFormat):
            raise FormatError(f"scales in {self.scale}", allowed="a floating-point format such as fp16 or fp32")
        return found.bits, self.group, (scale.bits + self.zero_point * found.bits) if self.group else 0

    def vector_bytes(self, width: int) -> int:
        """Return the bytes of one vector, its scales included, packed into whole bytes."""
        element, group, extra = self._bits
        groups = math.ceil(width / group) if group else 0
        return math.ceil(width * element / 8) + math.ceil(groups * extra / 8)


@dataclass(frozen=True)
class CachedLayer:
    """What one layer keeps of every token.

    Args:
        vectors: Widths of the vectors: keys and values of each key-value head, or a latent and its rotary part.
        window: Tokens that are kept at most; None for all.
        source: Whether the tokens are an encoder's, for cross-attention.
    """

    vectors: tuple[int, ...]
    window: int | None = None
    source: bool = False

    @staticmethod
    def of_heads(heads: int, width: int, *, values: int | None = None, window: int | None = None) -> CachedLayer:
        """Return a layer with keys and values of ``heads`` key-value heads (1 in multi-query attention)."""
        return CachedLayer((width,) * heads + (width if values is None else values,) * heads, window)

    @staticmethod
    def latent(rank: int, rotary: int) -> CachedLayer:
        """Return a layer of latent attention: one compressed vector and one rotary key for all heads.

        Source: DeepSeek-V2 (DeepSeek-AI 2024), section 2.1.4, table 1: ``d_c + d_h^R`` numbers for each token and layer.
        """
        return CachedLayer((rank, rotary))

    def kept(self, tokens: int, page: int = 1) -> int:
        """Return the tokens that memory is held for, in whole pages."""
        return math.ceil(min(tokens, self.window or tokens) / page) * page


@dataclass(frozen=True)
class KVCache:
    """The cache of keys and values of a model.

    Args:
        layers: What each layer keeps; layers that keep nothing of past tokens are left out.
        format: How numbers are stored.
        page: Tokens that memory is handed out for at once, 1 unless paged (vLLM: 16).
    """

    layers: tuple[CachedLayer, ...]
    format: CacheFormat = CacheFormat()
    page: int = 1

    def __post_init__(self) -> None:
        if self.page < 1:
            raise ModelError(f"page = {self.page} tokens", allowed="1 or more")

    @staticmethod
    def uniform(
        layers: int,
        *,
        heads: int,
        width: int,
        window: int | None = None,
        format: CacheFormat | None = None,
        page: int = 1,
    ) -> KVCache:
        """Return the cache of ``layers`` equal layers with ``heads`` key-value heads of ``width``."""
        one = CachedLayer.of_heads(heads, width, window=window)
        return KVCache((one,) * layers, format or CacheFormat(), page)

    def bytes(self, tokens: int, batch: int = 1, *, source_tokens: int = 0) -> int:
        """Return the bytes that ``batch`` sequences take.

        Args:
            tokens: Tokens of each sequence, prompt and answer.
            batch: Sequences.
            source_tokens: Tokens of the encoder, in an encoder-decoder model.

        Raises:
            ModelError: A number is negative.
        """
        for name, value in (("tokens", tokens), ("batch", batch), ("source_tokens", source_tokens)):
            if value < 0:
                raise ModelError(f"{name} = {value}", allowed="0 or more")
        kept = ((layer, layer.kept(source_tokens if layer.source else tokens, self.page)) for layer in self.layers)
        return batch * sum(count * self._token_bytes(layer) for layer, count in kept)

    @property
    def per_token(self) -> int:
        """Bytes that one more token of a sequence costs while no window is full, pages aside."""
        return sum(self._token_bytes(layer) for layer in self.layers if not layer.source)

    def sequences(self, tokens: int, memory: int, *, source_tokens: int = 0) -> int:
        """Return how many sequences of ``tokens`` fit into ``memory`` bytes.

        Raises:
            ModelError: A sequence without tokens, of which any number fits.
        """
        if tokens < 1:
            raise ModelError(f"tokens = {tokens}", allowed="1 or more")
        return memory // self.bytes(tokens, source_tokens=source_tokens)

    def _token_bytes(self, layer: CachedLayer) -> int:
        return sum(map(self.format.vector_bytes, layer.vectors))


def kv_cache(config: Any, *, format: CacheFormat | str = "bf16", page: int = 1) -> KVCache:
    """Return the cache that a configuration of transformers calls for.

    Multi-head, grouped-query and multi-query attention, sliding windows and chunks (of all layers or some), latent
    attention, layers that share another's cache, and the cross-attention of encoder-decoder models are known. Layers with
    a state of fixed size (linear attention, convolutions) keep nothing for each token.

    Args:
        config: A ``PreTrainedConfig``.
        format: How numbers are stored, or the name of a format.
        page: Tokens that memory is handed out for at once.

    Raises:
        ModelError: The configuration describes no attention layers.
        FormatError: The format is unknown.
    """
    stored = CacheFormat(format) if isinstance(format, str) else format
    decoder = config.get_text_config(decoder=True)
    return KVCache(tuple(_layers(decoder)), stored, page)


_WINDOWS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
_NOTHING = frozenset(["linear_attention", "conv", "mamba", "moe", "mlp", "recurrent"])


def _layers(config: Any) -> Iterator[CachedLayer]:
    count = _field(config, "num_decoder_layers") or _field(config, "num_hidden_layers")  # T5 counts its encoder apart
    if not count:
        raise ModelError(
            f"{type(config).__name__} says no number of layers", allowed="a configuration of a language model"
        )
    types = _field(config, "layer_types") or [None] * count
    shared = _field(config, "num_kv_shared_layers") or 0  # the last ones read an earlier layer's cache
    each = _field(config, "per_layer_config") or []
    each = each if len(each) == count else [config] * count
    for place, (kind, own) in enumerate(zip(types, each, strict=True)):
        if kind in _NOTHING or place >= count - shared:
            continue
        layer = _layer(own, _window(own, kind))
        yield layer
        if _field(config, "is_encoder_decoder"):
            yield CachedLayer(layer.vectors, source=True)


def _window(config: Any, kind: str | None) -> int | None:
    if kind is not None:
        return _field(config, _WINDOWS[kind]) if kind in _WINDOWS else None
    return _field(config, "sliding_window") or _field(config, "attention_chunk_size")


def _layer(config: Any, window: int | None) -> CachedLayer:
    if _field(config, "kv_lora_rank"):
        return CachedLayer.latent(config.kv_lora_rank, config.qk_rope_head_dim)
    heads = _field(config, "num_attention_heads")
    if not heads:
        raise ModelError(f"{type(config).__name__} says no number of heads", allowed="a configuration with attention")
    width = _field(config, "head_dim") or config.hidden_size // heads
    return CachedLayer.of_heads(_kv_heads(config, heads), width, values=_field(config, "v_head_dim"), window=window)


def _kv_heads(config: Any, heads: int) -> int:
    """Return the key-value heads: said as such, or by the flags of models from before there was a name for it."""
    if _field(config, "multi_query") and not _field(config, "new_decoder_architecture"):
        return 1  # Falcon-7B, StarCoder
    if _field(config, "new_decoder_architecture"):
        return config.num_kv_heads  # Falcon-40B and -180B; transformers itself caches a copy for every query head
    return _field(config, "num_key_value_heads") or heads


def _field(config: Any, name: str) -> Any:
    """Return a field of a configuration, whose classes each have their own; None if this one lacks it."""
    return getattr(config, name, None)
