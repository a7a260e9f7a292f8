"""What pages have in common: the templates that they are rendered from, and the figures at their heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

__all__ = ["Key", "template"]


@dataclass(frozen=True)
class Key:
    """A figure at the head of a page: what it is, its value, and what there is to say of it."""

    name: str
    value: str
    detail: str


@cache
def template(name: str, *filters: Callable[..., Any]) -> Template:
    """Return the template of that name beside this module; its filters go by the names of the functions."""
    loader = FileSystemLoader(Path(__file__).parent)
    engine = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters.update({function.__name__: function for function in filters})
    return engine.get_template(name)
