"""What a command leaves unimported."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager

__all__ = ["without_torchao"]


@contextmanager
def without_torchao(references: Iterable[str]) -> Generator[None]:
    """Keep transformers from importing torchao while configurations are counted.

    It would, wherever torchao is installed, for a quantiser that nothing here runs; that takes two seconds.

    Args:
        references: The models; nothing is kept away unless all are configurations (``hf:``), as others may need it.
    """
    if "torchao" in sys.modules or not all(one.startswith("hf:") for one in references):
        yield
        return
    sys.modules["torchao"] = None  # pyright: ignore[reportArgumentType] # what Python takes for "not to be imported"
    try:
        yield
    finally:
        del sys.modules["torchao"]
