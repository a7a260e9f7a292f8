"""INT8 EfficientNet-Lite0 by narrowcast and by its peers: same calibration images, same runtime, one run.

python benchmarks/peers.py [--environment FOLDER] [--graphs FOLDER]

The peers run in an environment of their own, made from ``peers/requirements.txt`` if the folder does not exist, and leave
their graphs in another folder, where a second run finds them. All graphs are then judged on the report part by the same
code, and timed interleaved in one process.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from narrowcast.data.dataset import split
from narrowcast.data.loaders import load_data
from narrowcast.data.metrics import get_metric
from narrowcast.measure.accuracy import Judge
from narrowcast.measure.environment import environment
from narrowcast.measure.latency import compare
from narrowcast.models.loaders import load_model
from narrowcast.recipes.recipe import Recipe, StaticInt8
from narrowcast.runtimes import get_runtime
from narrowcast.transforms.apply import apply_recipe

HERE = Path(__file__).parent


def peers(environment_folder: Path, model: Path, calibration: Path, out: Path) -> None:
    if not environment_folder.exists():
        subprocess.run([sys.executable, "-m", "venv", environment_folder], check=True)
        requirements = HERE / "peers" / "requirements.txt"
        subprocess.run([environment_folder / "bin/pip", "install", "-q", "-r", requirements], check=True)
    python = environment_folder / "bin/python"
    subprocess.run([python, HERE / "peers" / "quantise.py", model, calibration, out], check=True, cwd=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "narrowcast-peers")
    parser.add_argument("--graphs", type=Path, default=Path(tempfile.gettempdir()) / "narrowcast-peers-graphs")
    arguments = parser.parse_args()
    model = load_model("bundled:efficientnet-lite0")
    splits = split(load_data("bundled:photos", model), 0)
    runtime = get_runtime("onnxruntime")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        graphs = {"original": folder / "original.onnx"}
        graphs["original"].write_bytes(model.exported)
        recipe = Recipe(name="int8", steps=(StaticInt8(),))
        built = apply_recipe(recipe, model.graph, splits.calibration, runtime.rules)
        graphs["narrowcast"] = folder / "narrowcast.onnx"
        built.graph.save(graphs["narrowcast"])
        calibration = folder / "calibration.npz"
        np.savez(calibration, **splits.calibration.load(np.arange(splits.calibration.size)))
        arguments.graphs.mkdir(exist_ok=True)
        peers(arguments.environment, graphs["original"], calibration, arguments.graphs)
        graphs |= {path.stem: path for path in sorted(arguments.graphs.glob("*-*.onnx")) if "infer" not in path.stem}
        sessions = {name: runtime.load(path) for name, path in graphs.items()}
        judges = {n: Judge(splits.report, get_metric(n), sessions["original"]) for n in ("sqnr", "agreement")}
        batch = splits.report.load(np.zeros(1, np.int64))
        timed = compare(sessions, [batch], seconds=20, rounds=25)
        for name, session in sessions.items():
            row = {"name": name, "bytes": graphs[name].stat().st_size}
            for metric, judge in judges.items():
                score = judge.score(session)
                row[metric] = [score.value, score.low, score.high]
            speed = timed.speedup("original", name)
            row["speedup"] = [speed.value, speed.low, speed.high]
            rows.append(row)
            print(
                f"{name:28s} SQNR {row['sqnr'][0]:6.2f} dB  agreement {row['agreement'][0]:.4f}  "
                f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}]  {row['bytes'] / 1e6:.2f} MB",
                flush=True,
            )
    result = {
        "date": datetime.date.today().isoformat(),
        "what": "EfficientNet-Lite0, INT8, report part of bundled:photos (seed 0), ONNX Runtime, one thread, batch 1",
        "protocol": timed.protocol(),
        "calibration samples": splits.calibration.size,
        "report samples": splits.report.size,
        "peers": (HERE / "peers" / "requirements.txt").read_text().split(),
        "environment": environment().model_dump(),
        "rows": rows,
    }
    (HERE / "results" / "peers.json").write_text(json.dumps(result, indent=1).replace("Infinity", "null") + "\n")


main()
