"""The numerics doctor's record for TensorBoard: scalars, and histograms of exponents over the steps."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.errors import OutputError, RuntimeMissingError
from narrowcast.report.doctor_run import Run
from narrowcast.training.doctor.buckets import INFINITE_COLUMN
from narrowcast.training.doctor.values import Series

__all__ = ["write_board"]

#: The upper end of each octave, as a binary logarithm: columns 1 to 255.
_LIMITS = [float(column - 127) for column in range(1, INFINITE_COLUMN)]


def write_board(run: Run, folder: Path) -> int:
    """Write a run's record for TensorBoard, and return how many series there are.

    Histograms are of the exponent, ``log2`` of the magnitude: on TensorBoard's linear axis magnitudes themselves would be one
    bar. Zeros, infinities and NaN are scalars beside them, as shares.

    Args:
        run: What the run's folder says.
        folder: Where to; the files of earlier exports stay.

    Raises:
        RuntimeMissingError: TensorBoard or PyTorch is not installed.
        OutputError: The folder cannot be written.
    """
    try:
        importlib.import_module("tensorboard")
        library: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise RuntimeMissingError(
            "--tensorboard needs TensorBoard, which is not installed",
            next_step="install it with: pip install 'narrowcast[train]'",
        ) from error
    try:
        with library.SummaryWriter(str(folder)) as board:
            for reading in run.readings:
                scalars = {"loss": reading.loss, "gradient norm": reading.grad_norm, "loss scale": reading.scale}
                for name, value in scalars.items():
                    if value is not None and math.isfinite(value):
                        board.add_scalar(f"doctor/{name}", value, reading.step)
            for number, step in enumerate(run.skipped, 1):
                board.add_scalar("doctor/updates left out", number, step)
            for series in run.record.series:
                _write_series(board, series)
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {error.strerror}", next_step="name another") from error
    return len(run.record.series)


def _write_series(board: Any, series: Series) -> None:
    tag = f"{series.part.value}/{series.layer or '(model)'}"
    for place, step in enumerate(series.steps.tolist()):
        columns = series.columns[place]
        total = float(columns.sum()) or 1.0
        board.add_scalar(f"zeros/{tag}", float(columns[0]) / total, step)
        if columns[INFINITE_COLUMN:].any():
            board.add_scalar(f"not finite/{tag}", float(columns[INFINITE_COLUMN:].sum()) / total, step)
        octaves = columns[1:INFINITE_COLUMN]
        used = np.flatnonzero(octaves)
        if not used.size:
            continue
        first, last = int(used[0]), int(used[-1])
        middles = np.arange(first, last + 1) - 126.5
        counts = octaves[first : last + 1].astype(np.float64)
        board.add_histogram_raw(
            f"exponents/{tag}",
            min=_LIMITS[first] - 1,
            max=_LIMITS[last],
            num=int(counts.sum()),
            sum=float(middles @ counts),
            sum_squares=float(middles**2 @ counts),
            bucket_limits=_LIMITS[first : last + 1],
            bucket_counts=counts.tolist(),
            global_step=step,
        )
