"""Configs from YAML files and from ``key=value`` texts, with mistakes named by file and key."""

from __future__ import annotations

import copy
import difflib
import importlib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from narrowcast.errors import ConfigError, RuntimeMissingError
from narrowcast.training.config import Config, Section

__all__ = [
    "dump",
    "fields_of",
    "items_of",
    "put",
    "read_config",
    "read_yaml",
    "sections_of",
    "validated",
    "with_overrides",
]

#: Mistakes that one message lists.
_LISTED = 5

#: Plain words for pydantic's.
_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config that a YAML file holds.

    Args:
        path: The file.
        overrides: ``key=value`` texts, keys dotted (``optimizer.lr=3e-4``), values as YAML.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value is not allowed.
        RuntimeMissingError: PyYAML is not installed.
    """
    return validated(with_overrides(read_yaml(path), overrides), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, read without constructing anything but plain values.

    Raises:
        ConfigError: The file cannot be read or holds something else.
        RuntimeMissingError: PyYAML is not installed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"config {path} cannot be read: {reason}", allowed="a YAML file", next_step="check the path"
        ) from error
    return _mapping(_parsed(text, f"config {path}"), f"config {path}")


def with_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a config's values with some replaced.

    Args:
        raw: The values, not yet validated.
        overrides: ``key=value`` texts.

    Raises:
        ConfigError: A text is no ``key=value``, a key is unknown, or a value is no YAML.
    """
    changed = copy.deepcopy(dict(raw))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}", allowed="key=value, for example optimizer.lr=3e-4")
        put(changed, key.strip(), _parsed(value, f"override {text!r}"))
    return changed


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key in a config's values, which may hold sections in their short form.

    Raises:
        ConfigError: There is no such key.
    """
    parts = key.split(".")
    section: type[Section] | None = Config
    here = raw
    for place, part in enumerate(parts):
        sections = [] if section is None else fields_of(section)
        if section is not None and part not in sections:
            raise ConfigError(f"key {key!r} is unknown", allowed=_near(part, sections, ".".join(parts[:place])))
        section = None if section is None else section_at(section, part, here.get(part))
        if place == len(parts) - 1:
            here[part] = value
            return
        inner = here.get(part)
        if isinstance(inner, dict):
            here[part] = inner
        elif section is not None:
            here[part] = {} if inner is None or not section.first else {section.first: inner}
        else:
            here[part] = {}
        here = cast(dict[str, Any], here[part])


def validated(raw: Mapping[str, Any], source: str) -> Config:
    """Return the config that values describe.

    Args:
        raw: The values.
        source: How messages name where they come from.

    Raises:
        ConfigError: A key is unknown or a value is not allowed; the message names every mistake with its key.
    """
    try:
        return Config.model_validate(dict(raw))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    mistakes = [_said(mistake) for mistake in found]
    head = f"{source}: " if len(mistakes) == 1 else f"{source} has {len(mistakes)} mistakes:\n"
    more = f"\nand {len(mistakes) - _LISTED} more" if len(mistakes) > _LISTED else ""
    raise ConfigError(
        head + "\n".join(what for what, _ in mistakes[:_LISTED]) + more,
        allowed="\n".join(dict.fromkeys(allowed for _, allowed in mistakes[:_LISTED] if allowed)),
        next_step="mend it; the page on training in the documentation lists every key",
    )


def dump(config: Config) -> str:
    """Return a config as YAML, with every value that it holds."""
    yaml = _yaml()
    return str(
        yaml.safe_dump(
            config.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True, width=100
        )
    )


# Keys -----------------------------------------------------------------------------------------------------------------


def fields_of(section: type[Section]) -> list[str]:
    """Return the keys of a section."""
    return list(section.model_fields)


def sections_of(section: type[Section], key: str) -> list[type[Section]]:
    """Return the sections that a key may hold: none where its value is plain, several where a name chooses."""
    return _sections(section.model_fields[key].annotation)


def items_of(section: type[Section], key: str) -> list[type[Section]]:
    """Return the sections that a key holds several of, in a list or by names; none elsewhere."""
    annotation = section.model_fields[key].annotation
    inner = [part for part in get_args(annotation) if part is not Ellipsis and part is not str]
    return [one for part in inner for one in _sections(part)] if get_origin(annotation) in (dict, tuple) else []


def section_at(section: type[Section], key: str, value: Any) -> type[Section] | None:
    """Return the section that a key holds, chosen by the name that is given; None where its value is plain."""
    found = sections_of(section, key)
    name = cast(dict[str, Any], value).get("name") if isinstance(value, dict) else value
    named = [one for one in found if "name" in one.model_fields and one.model_fields["name"].default == name]
    return (named or found or [None])[0]


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _sections(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [found for part in get_args(annotation) for found in _sections(part)]
    return []


def _dotted(section: type[Section], path: str = "") -> Iterator[str]:
    """Yield the keys of a section and of those below it, dotted, once for each section that may hold them."""
    for key in fields_of(section):
        yield path + key
        for inner in sections_of(section, key):
            yield from _dotted(inner, f"{path}{key}.")


def _near(given: str, known: Sequence[str], path: str) -> str:
    """Return the keys that a section has, and the one that was meant: the nearest here, or the same one elsewhere."""
    listed = f"keys of {path}: {', '.join(known)}" if path else ", ".join(known)
    near = difflib.get_close_matches(given, known, n=1)
    meant = [f"{path}.{key}" if path else key for key in near]
    if not near:
        meant = [key for key in dict.fromkeys(_dotted(Config)) if key.rpartition(".")[2] == given]
    return f"{listed} (did you mean {' or '.join(meant)}?)" if meant else listed


# Messages -------------------------------------------------------------------------------------------------------------


def _said(mistake: ErrorDetails) -> tuple[str, str]:
    """Return what is wrong and what is allowed."""
    keys, section = _path(mistake["loc"])
    path = ".".join(keys)
    if mistake["type"] == "extra_forbidden" and section is not None:
        return f"key {path!r} is unknown", _near(keys[-1], fields_of(section), ".".join(keys[:-1]))
    if mistake["type"] == "missing":
        return f"key {path!r} is missing", ""
    message = mistake["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if mistake["type"] in ("value_error", "optimizer"):
        return (f"{path}: {message}" if path else message), ""
    if section is not None and mistake["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = f"a section with {', '.join(fields_of(_held(section, keys)))}"
    return f"{path} = {mistake['input']!r}", f"{path}: {_WORDS.get(message, message)}"


def _held(section: type[Section], keys: Sequence[str]) -> type[Section]:
    """Return the section that belongs at a place: below the last key, or in a list or by a name of the key before it."""
    if keys[-1] in section.model_fields:
        return section_at(section, keys[-1], None) or section
    items = items_of(section, keys[-2]) if len(keys) > 1 and keys[-2] in section.model_fields else []
    return items[0] if items else section


def _path(places: Sequence[int | str]) -> tuple[list[str], type[Section] | None]:
    """Return the keys of a place as people write them, and the section that the last key stands in.

    Pydantic's places also hold the tag of a union, which is no key.
    """
    keys: list[str] = []
    section: type[Section] | None = Config
    inside: list[type[Section]] = [Config]
    items: list[type[Section]] = []
    for place in places:
        tags = [one for one in inside if "name" in one.model_fields and one.model_fields["name"].default == place]
        if len(inside) > 1 and tags:
            inside = tags
            continue
        keys.append(str(place))
        if items:  # a name or a number of one's own
            inside, items = items, []
            continue
        section = inside[0] if inside else None
        known = section is not None and str(place) in section.model_fields
        inside = sections_of(section, str(place)) if known and section is not None else []
        items = items_of(section, str(place)) if known and section is not None else []
    return keys, section


# YAML -----------------------------------------------------------------------------------------------------------------


def _parsed(text: str, source: str) -> Any:
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is no YAML: {' '.join(str(error).split())}", next_step="mend it") from error


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in cast(dict[Any, Any], value)):
        raise ConfigError(
            f"{source} holds {type(value).__name__}", allowed=f"a mapping with {', '.join(fields_of(Config))}"
        )
    return cast(dict[str, Any], value)


def _yaml() -> Any:
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise RuntimeMissingError(
            "configs need PyYAML, which is not installed", next_step="install it with: pip install 'narrowcast[train]'"
        ) from error
