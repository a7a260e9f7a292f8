"""An artifact with all that an edge device needs to run it."""

from __future__ import annotations

from narrowcast.serving.bundling.bundle import Bundle, write_bundle

__all__ = ["Bundle", "write_bundle"]
