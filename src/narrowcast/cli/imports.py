"""What a command leaves unimported."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["import_transformers"]

_SHARED = "transformers.modeling_utils"  # what all models of transformers are built on
_CONFIGURATION = "hf:"
_DECODERS = ("ForCausalLM", "LMHeadModel")  # how transformers calls them


def import_transformers(references: Sequence[str]) -> None:
    """Import what the models of transformers share, without the packages that counting these models never calls.

    Wherever they are installed, transformers imports torchao for a quantiser, and SciPy and torchvision for losses and
    images of vision models; together that takes three seconds. They can be imported again afterwards. Nothing happens where
    transformers is not installed: what needs it says so.

    Args:
        references: The models; a package is left out only if none of them may need it.
    """
    if not all(one.startswith(_CONFIGURATION) for one in references):
        return
    with _hidden(name for name, idle in _IDLE.items() if all(map(idle, references))):
        try:
            importlib.import_module(_SHARED)
        except ImportError:
            return


@contextmanager
def _hidden(names: Iterable[str]) -> Generator[None]:
    """Have packages that are not imported yet count as not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # pyright: ignore[reportCallIssue, reportArgumentType] # None: "there is none"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _is_configuration(reference: str) -> bool:
    return reference.startswith(_CONFIGURATION)


def _is_language_model(reference: str) -> bool:
    """Return whether a configuration is of a language model that decodes alone; False where it does not say."""
    try:
        fields = json.loads((Path(reference.removeprefix(_CONFIGURATION)) / "config.json").read_text(encoding="utf-8"))
        architectures = fields["architectures"]
        return bool(architectures) and all(name.endswith(_DECODERS) for name in architectures)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # what reads the configuration says what is wrong
        return False


#: Packages by when they are idle: for which references nothing that is counted calls them.
_IDLE: dict[str, Callable[[str], bool]] = {
    "torchao": _is_configuration,
    "scipy": _is_language_model,
    "torchvision": _is_language_model,
}
