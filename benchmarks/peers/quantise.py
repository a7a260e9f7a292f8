"""Quantise one model with each peer; runs in the peers' own environment and knows nothing of narrowcast.

python quantise.py MODEL.onnx CALIBRATION.npz OUT_FOLDER

Graphs that OUT_FOLDER holds already are not made again: some peers take many minutes.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnx


def onnxruntime_peers(model, data, out):
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.rows = iter(range(len(next(iter(data.values())))))

        def get_next(self):
            row = next(self.rows, None)
            return None if row is None else {name: array[row : row + 1] for name, array in data.items()}

    prepared = out / "prepared.onnx"
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    for name in ("MinMax", "Percentile", "Entropy"):
        path = out / f"onnxruntime-{name.lower()}.onnx"
        if path.exists():
            continue
        begin = time.time()
        q.quantize_static(
            prepared,
            path.with_suffix(".partial"),
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod[name],
        )
        path.with_suffix(".partial").rename(path)
        print(f"onnxruntime-{name.lower()} {time.time() - begin:.0f} s", flush=True)


def nncf_peers(model, data, out):
    import nncf

    size = len(next(iter(data.values())))
    rows = [{name: array[i : i + 1] for name, array in data.items()} for i in range(size)]
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        for fast in (True, False):
            path = out / f"nncf-{preset.value}-{'fast' if fast else 'full'}-bias.onnx"
            if path.exists():
                continue
            begin = time.time()
            quantised = nncf.quantize(
                onnx.load(model), nncf.Dataset(rows), subset_size=size, preset=preset, fast_bias_correction=fast
            )
            onnx.save(quantised, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
            print(f"{path.stem} {time.time() - begin:.0f} s", flush=True)


def main():
    model, calibration, out = (Path(argument) for argument in sys.argv[1:4])
    with np.load(calibration) as archive:
        data = {name: archive[name] for name in archive.files}
    onnxruntime_peers(model, data, out)
    nncf_peers(model, data, out)


main()
