"""What happened to the numbers of a run, for programs: plain values that JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from narrowcast.report.doctor_run import Held, LayerView, PartView, Run
from narrowcast.training.doctor.whatif import Shares

__all__ = ["doctor_record"]


def doctor_record(run: Run) -> dict[str, Any]:
    """Return a run's verdict, events, advice and layers; infinities and NaN are texts."""
    summary = run.record.summary
    return {
        "run": str(run.folder),
        "healthy": run.healthy,
        "headline": run.headline,
        "findings": [] if summary is None else list(summary.verdict.sentences),
        "notes": list(run.notes),
        "setting": _plain(run.record.setting),
        "formats": list(run.formats),
        "steps": run.steps,
        "skips": [
            {"step": one.step, "layers": list(one.layers), "kind": one.kind, "scale": one.scale} for one in run.skips
        ],
        "loss_scale": run.scale,
        "events": [_plain(one.first) | {"count": one.count, "last": one.last} for one in run.events],
        "advice": {
            "scale": None if summary is None or summary.scale is None else _plain(summary.scale),
            "formats": [] if summary is None else [_plain(one) for one in summary.formats],
        },
        "layers": [_layer(layer) for layer in run.layers],
    }


def _plain(value: BaseModel) -> dict[str, Any]:
    return json.loads(value.model_dump_json())


def _layer(layer: LayerView) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "parameters": layer.parameters,
        "parts": {part.value: _part(view) for part, view in layer.parts.items()},
        "update_to_weight": layer.ratio,
        "stagnant": {name: list(found) for name, found in layer.stagnant.items()},
    }


def _part(view: PartView) -> dict[str, Any]:
    return {
        "largest": view.largest if math.isfinite(view.largest) else str(view.largest),
        "smallest": view.smallest,
        "count": view.count,
        "numbers": view.numbers,
        "infinite": view.infinite,
        "nan": view.nan,
        "formats": {name: _held(held) for name, held in view.held.items()},
    }


def _held(held: Held) -> dict[str, Any]:
    return {"plain": _shares(held.plain), "scaled": _shares(held.scaled)}


def _shares(found: Shares) -> dict[str, Any]:
    """Return shares with the least and the greatest value that each can have."""
    pairs: dict[str, Sequence[float]] = {
        "overflow": found.overflow,
        "zero": found.zero,
        "subnormal": found.subnormal,
    }
    return {"scale": found.scale, **{name: list(pair) for name, pair in pairs.items()}}
