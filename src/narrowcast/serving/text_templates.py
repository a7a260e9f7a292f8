"""Templates of text that people keep: programs, units, manifests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

__all__ = ["render_text"]


def render_text(
    template: Path, values: Mapping[str, object], filters: Mapping[str, Callable[..., Any]] | None = None
) -> str:
    """Return a template filled in; nothing is escaped but by the filters, and a value that is missing is an error."""
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    engine.filters.update(filters or {})
    return engine.get_template(template.name).render(values)
