"""What the page on training shows of configs: a table of keys for each section, read from the models that check them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from narrowcast.training.config import Config, Section
from narrowcast.training.reading import fields_of, items_of, sections_of

__all__ = ["write"]

_KINDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text", "Any": "any value"}


def write(folder: Path) -> None:
    """Write the tables that the page includes; a file that says the same already keeps its date."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "training-config.inc"
    text = "\n".join(_lines(Config, "", set()))
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _lines(section: type[Section], path: str, told: set[type[Section]]) -> list[str]:
    """Return a table of a section's keys, and after it those of the sections in it."""
    title = f"### `{path}`" if path else "### The config"
    choice = f", `name: {section.model_fields['name'].default}`" if _is_choice(section) else ""
    lines = [title + choice, "", _first_line(section), "", "| key | value | default | |", "|---|---|---|---|"]
    below: list[str] = []
    for key in fields_of(section):
        field = section.model_fields[key]
        lines.append(f"| `{key}` | {_kind(field.annotation)} | {_default(field)} | {field.description} |")
        for inner in (*sections_of(section, key), *items_of(section, key)):
            if inner not in told:
                told.add(inner)
                below += _lines(inner, f"{path}.{key}".lstrip("."), told)
    return [*lines, "", *below]


def _is_choice(section: type[Section]) -> bool:
    """Return whether the section is one of several that a name chooses among."""
    field = section.model_fields.get("name")
    return field is not None and len(get_args(field.annotation)) == 1 and str(field.annotation).startswith("typing.Lit")


def _first_line(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _kind(annotation: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    text = str(annotation)
    arguments = [one for one in get_args(annotation) if one is not type(None)]
    if text.startswith("typing.Literal"):
        return ", ".join(f"`{one}`" for one in arguments)
    if text.startswith("typing.Annotated"):
        return _kind(arguments[0])
    if text.startswith("dict["):
        return "mapping"
    if text.startswith("tuple["):
        return "list"
    if len(arguments) == 1:
        return _kind(arguments[0])
    if arguments:
        return " or ".join(dict.fromkeys(_kind(one) for one in arguments))
    name = annotation.__name__ if isinstance(annotation, type) else text.rpartition(".")[2]
    return _KINDS.get(name, name)


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if value is None or isinstance(value, Section) or value in ({}, ()):
        return ""
    shown = list(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
    return f"`{shown}`"
