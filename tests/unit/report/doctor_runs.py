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


def _range(name: str, shape: tuple[int, ...], low: float, high: float, smallest: float, **counts: int) -> Range:
    values = {"zeros": 0, "infinite": 0, "nan": 0, **counts}
    return Range(name=name, dtype="float16", shape=shape, low=low, high=high, smallest=smallest, **values)


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
            _range("input 0", (64, 128), -311.0, 402.5, 6e-8, zeros=3),
            _range("weight", (512, 128), -9.1, 8.75, 1e-5),
            _range("result", (64, 512), -65504.0, 65472.0, 0.25, infinite=17),
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


def _event(kind: EventKind, step: int, sentence: str, cause: Cause | None = None) -> Event:
    normal = kind is EventKind.BACKOFF
    return Event(kind=kind, step=step, rank=0, normal=normal, sentence=sentence, cause=cause)


def _setting(scaled: bool) -> Setting:
    compute = "fp16" if scaled else "bf16"
    kinds = {name: "Conv2d" if "conv" in name else "Linear" for name in LAYERS}
    return Setting(
        level="deep",
        every=EVERY,
        precision=f"{compute}-mixed",
        compute=compute,
        formats=("fp16", "e4m3fn", "e5m2"),
        layers=tuple(Layer(name=name, kind=kind, parameters=4096) for name, kind in kinds.items()),
    )


def _readings(rng: np.random.Generator, healthy: bool, scaled: bool) -> list[Reading]:
    losses = 2.3 * np.exp(-np.arange(STEPS) / 90) + 0.05 * rng.random(STEPS)
    return [
        Reading(
            step=step,
            loss=math.inf if step == 118 and not healthy else float(losses[step]),
            grad_norm=float(3 * np.exp(-step / 120) * (1 + 0.3 * rng.random())),
            scale=2.0 ** (16 if step < 118 else 15) if scaled else 1.0,
        )
        for step in range(STEPS)
    ]


def _events(healthy: bool) -> list[Event]:
    normal = [_event(EventKind.BACKOFF, 2, "The loss scale went from 2^17 to 2^16: it was too large at the start.")]
    faults = [
        _event(EventKind.NONFINITE, 118, "The loss became infinite: blocks.1.mlp.up overflowed FP16.", _cause()),
        _event(EventKind.VANISHED, 180, "61% of the gradients of stem.conv became zero."),
    ]
    return normal if healthy else normal + faults


def _summary(healthy: bool, scaled: bool) -> Summary:
    faults = (
        "blocks.1.mlp.up overflows FP16 in the forward pass from step 118 on; keep it in fp32.",
        "61% of the gradients of stem.conv become zero.",
    )
    scale = ScaleAdvice(
        scale=2.0**14,
        format="fp16",
        margin=8.0,
        lost=0.31,
        lost_scaled=0.002,
        evidence="The largest gradient is 0.42; with this scale 0.2% become zero instead of 31%.",
    )
    formats = tuple(
        FormatAdvice(
            layer=name,
            part=part,
            format="fp32" if name == LAYERS[4] and part is Part.FORWARD else "e5m2",
            scale=1.0,
            evidence="0.01% become zero",
        )
        for name in LAYERS
        for part in (Part.FORWARD, Part.BACKWARD)
    )
    verdict = Verdict(healthy=healthy, sentences=("All numbers fit their formats.",) if healthy else faults)
    return Summary(verdict=verdict, scale=scale if scaled else None, formats=formats)


def _histograms(rng: np.random.Generator, healthy: bool) -> list[Series]:
    centres = {
        Part.FORWARD: (0.0, 2.0),
        Part.BACKWARD: (-22.0, 4.0),
        Part.WEIGHT: (-5.0, 1.5),
        Part.UPDATE: (-14.0, 2.0),
        Part.RATIO: (-9.0, 2.0),
    }
    moved = {(LAYERS[4], Part.FORWARD): 7.0} if not healthy else {}
    return [
        _series(name, part, centre + moved.get((name, part), 0.3 * place), spread, rng)
        for place, name in enumerate(LAYERS)
        for part, (centre, spread) in centres.items()
    ]


def write_run(folder: Path, *, healthy: bool = False, scaled: bool = True) -> Path:
    """Write a run's folder and return it: FP16 with a loss scale, and unless it is healthy an overflow in the forward pass."""
    rng = np.random.default_rng(0)
    record = folder / "doctor"
    readings = _readings(rng, healthy, scaled)
    append(record, [_setting(scaled), *readings, *_events(healthy), _summary(healthy, scaled)])
    write_series(record, _histograms(rng, healthy))
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
