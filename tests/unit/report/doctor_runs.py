"""Run folders with a doctor's record, as training writes them, for tests of what is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from narrowcast.training.doctor.buckets import BUCKETS, EDGES, INFINITE, fold
from narrowcast.training.doctor.record import append, write_series
from narrowcast.training.doctor.values import (
    Cause,
    Event,
    EventKind,
    FormatAdvice,
    Layer,
    Part,
    Range,
    Reading,
    Remedy,
    ScaleAdvice,
    Series,
    Setting,
    Summary,
    Verdict,
)

__all__ = ["LAYERS", "counted", "write_run"]

LAYERS = (
    "stem.conv",
    "blocks.0.attention.query",
    "blocks.0.mlp.up",
    "blocks.1.attention.query",
    "blocks.1.mlp.up",
    "head",
)
STEPS = 240
EVERY = 20


def counted(values: np.ndarray) -> np.ndarray:
    """Return the histogram of values: shape [BUCKETS]."""
    magnitudes = np.abs(values.astype(np.float64))
    places = np.searchsorted(EDGES, magnitudes[magnitudes > 0], side="left")
    counts = np.bincount(places, minlength=BUCKETS)[:BUCKETS].astype(np.int64)
    counts[0] = int((magnitudes == 0).sum())
    counts[INFINITE] = int(np.isinf(magnitudes).sum())
    return counts


def _series(layer: str, part: Part, centre: float, spread: float, rng: np.random.Generator) -> Series:
    steps = np.arange(0, STEPS, EVERY)
    values = [2.0 ** rng.normal(centre + 0.01 * step, spread, 4000) for step in steps]
    buckets = np.stack([counted(one) for one in values])
    return Series(
        layer=layer,
        part=part,
        steps=steps,
        scales=np.full(len(steps), 2.0**15),
        columns=fold(buckets),
        largest=np.array([one.max() for one in values]),
        total=buckets.sum(0),
        numbers=int(buckets.sum()),
        seen=len(steps),
    )


def _cause() -> Cause:
    return Cause(
        step=118,
        rank=0,
        part=Part.FORWARD,
        layer="blocks.1.mlp.up",
        operator="aten.addmm",
        call=0,
        kind="inf",
        inputs=(
            Range(
                name="input 0",
                dtype="float16",
                shape=(64, 128),
                low=-311.0,
                high=402.5,
                smallest=6e-8,
                zeros=3,
                infinite=0,
                nan=0,
            ),
            Range(
                name="weight",
                dtype="float16",
                shape=(512, 128),
                low=-9.1,
                high=8.75,
                smallest=1e-5,
                zeros=0,
                infinite=0,
                nan=0,
            ),
            Range(
                name="result",
                dtype="float16",
                shape=(64, 512),
                low=-65504.0,
                high=65472.0,
                smallest=0.25,
                zeros=0,
                infinite=17,
                nan=0,
            ),
        ),
        seen="The result of aten.addmm holds 17 infinities; its inputs are finite, the largest 402.5.",
        remedies=(
            Remedy(
                kind="layer",
                setting="keep layer 'blocks.1.mlp.up' in fp32",
                mended=True,
                evidence="the largest result is 81,234",
                overrides={"blocks.1.mlp.up": "fp32"},
            ),
            Remedy(
                kind="format", setting="train with bf16-mixed", mended=True, evidence="the largest result is 81,408"
            ),
            Remedy(
                kind="scale",
                setting="halve the loss scale",
                mended=False,
                evidence="17 infinities as before: the forward pass does not carry it",
            ),
        ),
    )


def write_run(folder: Path, *, healthy: bool = False, scaled: bool = True) -> Path:
    """Write a run's folder and return it: FP16 with a loss scale, and unless it is healthy an overflow in the forward pass."""
    rng = np.random.default_rng(0)
    record = folder / "doctor"
    layers = tuple(Layer(name=name, kind="Conv2d" if "conv" in name else "Linear", parameters=4096) for name in LAYERS)
    setting = Setting(
        level="deep",
        every=EVERY,
        precision="fp16-mixed" if scaled else "bf16-mixed",
        compute="fp16" if scaled else "bf16",
        formats=("fp16", "e4m3fn", "e5m2"),
        layers=layers,
    )
    losses = 2.3 * np.exp(-np.arange(STEPS) / 90) + 0.05 * rng.random(STEPS)
    readings = [
        Reading(
            step=step,
            loss=math.inf if step == 118 and not healthy else float(losses[step]),
            grad_norm=float(3 * np.exp(-step / 120) * (1 + 0.3 * rng.random())),
            scale=2.0 ** (16 if step < 118 else 15) if scaled else 1.0,
        )
        for step in range(STEPS)
    ]
    events = [
        Event(
            kind=EventKind.BACKOFF,
            step=2,
            rank=0,
            normal=True,
            sentence="The loss scale went from 2^17 to 2^16: it was too large at the start.",
        )
    ]
    if not healthy:
        events.append(
            Event(
                kind=EventKind.NONFINITE,
                step=118,
                rank=0,
                normal=False,
                sentence="The loss became infinite: blocks.1.mlp.up overflowed FP16.",
                cause=_cause(),
            )
        )
        events.append(
            Event(
                kind=EventKind.VANISHED,
                step=180,
                rank=0,
                normal=False,
                sentence="61% of the gradients of stem.conv became zero.",
            )
        )
    summary = Summary(
        verdict=Verdict(
            healthy=healthy,
            sentences=("All numbers fit their formats.",)
            if healthy
            else (
                "blocks.1.mlp.up overflows FP16 in the forward pass from step 118 on; keep it in fp32.",
                "61% of the gradients of stem.conv become zero.",
            ),
        ),
        scale=ScaleAdvice(
            scale=2.0**14,
            format="fp16",
            margin=8.0,
            lost=0.31,
            lost_scaled=0.002,
            evidence="The largest gradient is 0.42; with this scale 0.2% become zero instead of 31%.",
        )
        if scaled
        else None,
        formats=tuple(
            FormatAdvice(
                layer=name,
                part=part,
                format="fp32" if name == LAYERS[4] and part is Part.FORWARD else "e5m2",
                scale=1.0,
                evidence="0.01% become zero",
            )
            for name in LAYERS
            for part in (Part.FORWARD, Part.BACKWARD)
        ),
    )
    append(record, [setting, *readings, *events, summary])
    centres = {
        Part.FORWARD: (0.0, 2.0),
        Part.BACKWARD: (-22.0, 4.0),
        Part.WEIGHT: (-5.0, 1.5),
        Part.UPDATE: (-14.0, 2.0),
        Part.RATIO: (-9.0, 2.0),
    }
    series = [
        _series(
            name,
            part,
            centre + (7.0 if name == LAYERS[4] and part is Part.FORWARD and not healthy else 0.3 * place),
            spread,
            rng,
        )
        for place, name in enumerate(LAYERS)
        for part, (centre, spread) in centres.items()
    ]
    write_series(record, series)
    lines = [
        {
            "step": one.step + 1,
            "loss": one.loss if math.isfinite(one.loss or 0.0) else "inf",
            "grad_norm": one.grad_norm,
            "scale": one.scale,
            "skipped": 0,
            "lr": 1e-3,
        }
        for one in readings[::10]
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skip = {
        "step": 118,
        "attempt": 118,
        "rank": 0,
        "layers": ["blocks.1.mlp.up.weight"],
        "kind": "inf",
        "scale": 65536.0,
    }
    (folder / "skips.jsonl").write_text("" if healthy else json.dumps(skip) + "\n")
    return folder
