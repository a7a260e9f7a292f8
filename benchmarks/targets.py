"""What the project promises to reach, measured: the main job on the bundled models.

python benchmarks/targets.py [NAME ...]
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import narrowcast as nc

HERE = Path(__file__).parent

TARGETS = {
    "efficientnet-int8": ("bundled:efficientnet-lite0", "bundled:photos", {}, "onnxruntime"),
    "efficientnet-drop2": ("bundled:efficientnet-lite0", "bundled:photos", {"max_drop": "2%"}, "onnxruntime"),
    "efficientnet-openvino": ("bundled:efficientnet-lite0", "bundled:photos", {}, "openvino"),
    "minilm": ("bundled:minilm", "bundled:sentences", {"at_least": 0.99}, "onnxruntime"),
    "digits": ("bundled:digits-cnn", "bundled:digits", {"max_drop": "0.5pt"}, "onnxruntime"),
}


def main() -> None:
    names = sys.argv[1:] or list(TARGETS)
    for name in names:
        model, data, limits, runtime = TARGETS[name]
        metric = "cosine" if "minilm" in model else None
        begin = time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = nc.optimize(
                model,
                data=data,
                out=Path(folder) / "out",
                metric=metric,
                budget=nc.Budget.parse(**limits),
                target=nc.Target(runtime=runtime),
            )
            shown = result.evidence.model_dump(
                mode="json",
                include={"created", "model", "data", "metric", "budget", "target", "environment", "chosen"}
                | {"verdict", "measurements", "candidates", "evaluations", "seconds"},
            )
        for candidate in shown["candidates"]:
            del candidate["recipe"]
        shown["peak_memory_of_the_run"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (HERE / "results" / f"{name}.json").write_text(json.dumps(shown, indent=1) + "\n")
        print(f"{name}: {time.time() - begin:.0f} s: {result}", flush=True)


main()
