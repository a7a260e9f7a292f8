"""Quantise one model with a peer; runs in the peers' own environment and knows nothing of narrowcast.

python quantise.py MODEL.onnx CALIBRATION.npz OUT_FOLDER
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnx


def onnxruntime_peers(model, data, out):
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self):
            self.rows = iter(range(len(next(iter(data.values())))))

        def get_next(self):
            row = next(self.rows, None)
            return None if row is None else {name: array[row : row + 1] for name, array in data.items()}

    for name in ("MinMax", "Percentile", "Entropy"):
        begin = time.time()
        q.quantize_static(
            model,
            out / f"onnxruntime-{name.lower()}.onnx",
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=q.CalibrationMethod[name],
        )
        print(f"onnxruntime-{name.lower()} {time.time() - begin:.0f} s", flush=True)


def nncf_peers(model, data, out):
    import nncf

    size = len(next(iter(data.values())))
    rows = [{name: array[i : i + 1] for name, array in data.items()} for i in range(size)]
    for preset in (nncf.QuantizationPreset.PERFORMANCE, nncf.QuantizationPreset.MIXED):
        for fast in (True, False):
            begin = time.time()
            quantised = nncf.quantize(
                onnx.load(model), nncf.Dataset(rows), subset_size=size, preset=preset, fast_bias_correction=fast
            )
            name = f"nncf-{preset.value}-{'fast' if fast else 'full'}-bias"
            onnx.save(quantised, out / f"{name}.onnx")
            print(f"{name} {time.time() - begin:.0f} s", flush=True)


def main():
    model, calibration, out = (Path(argument) for argument in sys.argv[1:4])
    with np.load(calibration) as archive:
        data = {name: archive[name] for name in archive.files}
    onnxruntime_peers(model, data, out)
    nncf_peers(model, data, out)


main()
