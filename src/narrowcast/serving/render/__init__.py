"""Files that deploy a server: units, images, manifests, all from the options of one ``narrowcast serve`` command."""

from __future__ import annotations

from narrowcast.serving.render.deployment import Deployment, Given
from narrowcast.serving.render.rendering import KINDS, Rendered, check_kind, render

__all__ = ["KINDS", "Deployment", "Given", "Rendered", "check_kind", "render"]
