"""Real models behind the server, for `serving.py models`.

- INT8 EfficientNet-Lite0 with two workers, asked over HTTP, beside two processes that each run a bare session of the same
  file in a loop. Inputs of 600 kB go through the socket, or lie in shared memory that the client registered. Nobody is
  pinned; the load shares the cores with the workers, and its processor time counts against the server.
- A model whose time goes into reading its weights, so that a batch takes hardly longer than a row: two layers of 4096 by
  4096 in FP32. ``narrowcast load --compare-batching`` seeks the goodput under a bound on p99 with dynamic batching, static
  batching and none, in turns; it takes about three minutes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper
from serving_load import binary_post, http_loop, shared_post
from serving_programs import make_artifact

__all__ = ["run"]

HERE = Path(__file__).parent
WORK = HERE / "serving.work"
REGION = "picture"
WIDTH = 4096
BOUND_MS = 100
#: After which the comparison has hung.
COMPARISON_SECONDS = 420
_BARE = """
import sys, time
import numpy as np
from narrowcast.runtimes import get_runtime

session = get_runtime("onnxruntime").load(__import__("pathlib").Path(sys.argv[1]), threads=1)
info = session.inputs[0]
batch = {info.name: np.zeros((1, *info.shape[1:]), np.float32)}
session.run(batch)
print("ready", flush=True)
for line in sys.stdin:
    count, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < float(line):
        session.run(batch)
        count += 1
    print(count / elapsed, flush=True)
"""


def run(seconds: float, rounds: int) -> dict[str, object]:
    """Measure both, print what was found, and return it."""
    return {"efficientnet": efficientnet(seconds, rounds), "batching": batching(seconds)}


# EfficientNet-Lite0 ---------------------------------------------------------------------------------------------------


def efficientnet(seconds: float, rounds: int) -> dict[str, object]:
    from serving import running

    folder = efficientnet_artifact()
    info = onnx.load(folder / "model.onnx").graph.input[0]
    shape = [1, *(dim.dim_value for dim in info.type.tensor_type.shape.dim[1:])]
    size = 4 * int(np.prod(shape))
    requests = {
        "socket": binary_post(folder.name, info.name, shape, bytes(size)),
        "shared memory": shared_post(folder.name, info.name, shape, REGION, size),
    }
    program = [sys.executable, HERE / "serving_programs.py", f"{folder}?workers=2&batch=1", "all"]
    rates: dict[str, list[float]] = {name: [] for name in ("bare", *requests)}
    with ExitStack() as stack:
        server = stack.enter_context(running(program))
        stack.enter_context(_region(server.ports["http"], size))
        bare = [stack.enter_context(_session(folder / "model.onnx")) for _ in range(2)]
        for _ in range(rounds):
            for name, request in requests.items():
                looped = http_loop(server.ports["http"], request, _check, 4, seconds, server.pid)
                rates[name].append(uvloop.run(looped).rate)
            rates["bare"].append(_bare_rate(bare, seconds))
    ratios = {name: [one / alone for one, alone in zip(rates[name], rates["bare"], strict=True)] for name in requests}
    for name, found in ratios.items():
        spread = f"rounds: {min(found):.3f} to {max(found):.3f}"
        print(
            f"EfficientNet-Lite0 INT8, two workers, {name}: {statistics.median(found):.3f} of bare ({spread})",
            flush=True,
        )
    return {"ratios": {name: statistics.median(found) for name, found in ratios.items()}, "rates": rates}


@contextmanager
def _region(port: int, size: int) -> Iterator[None]:
    """Register a region of zeros with the server; the object is gone afterwards."""
    memory = SharedMemory(create=True, size=size)
    body = json.dumps({"key": memory.name, "byte_size": size}).encode()
    url = f"http://127.0.0.1:{port}/v2/systemsharedmemory/region/{REGION}/register"
    try:
        urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=10).close()
        yield
    finally:
        memory.close()
        memory.unlink()


def efficientnet_artifact() -> Path:
    """Return the artifact, made the first time."""
    folder = WORK / "efficientnet-int8"
    if (folder / "manifest.json").exists():
        return folder
    from narrowcast.data.dataset import split
    from narrowcast.data.loaders import load_data
    from narrowcast.models.loaders import load_model
    from narrowcast.recipes.recipe import Recipe, StaticInt8
    from narrowcast.runtimes import get_runtime
    from narrowcast.transforms.apply import apply_recipe

    model = load_model("bundled:efficientnet-lite0")
    calibration = split(load_data("bundled:photos", model), 0).calibration
    recipe = Recipe(name="int8", steps=(StaticInt8(),))
    built = apply_recipe(recipe, model.graph, calibration, get_runtime("onnxruntime").rules)
    folder.mkdir(parents=True, exist_ok=True)
    built.graph.save(folder / "model.onnx")
    return make_artifact(folder)


def _session(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BARE, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _bare_rate(processes: list[subprocess.Popen[str]], seconds: float) -> float:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return sum(float(process.stdout.readline()) for process in processes if process.stdout is not None)


def _check(answer: bytes) -> None:
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


# Batching -------------------------------------------------------------------------------------------------------------


def batching(seconds: float) -> dict[str, object]:
    command: list[str | Path] = ["timeout", "--signal=INT", f"{COMPARISON_SECONDS}"]  # ctrl-C, at which servers end too
    command += [sys.executable, "-m", "narrowcast", "load", wide_artifact(), "--model", "wide", "--compare-batching"]
    command += ["--slo", f"p99={BOUND_MS}ms", "--serve", "--max-batch 32 --delay 5", "--json"]
    command += ["--seconds", str(max(2.0, seconds)), "--warmup", "0.3"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    if "error" in found:
        raise SystemExit(found["error"]["message"])
    words = [f"{kind} {rate['value']:.0f}/s" for kind, rate in found["goodputs"].items()]
    words += [
        f"dynamic over {kind} {gain['value']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f})"
        for kind, gain in found["gains"].items()
    ]
    words += [f"VOID: {one['words']}" for one in found["run"]["findings"] if one["void"]]
    print(f"weights of {2 * WIDTH**2 * 4 >> 20} MiB, p99 within {BOUND_MS} ms: {', '.join(words)}", flush=True)
    kept = ("goodputs", "gains", "probes", "protocol")
    return {"bound": f"p99 within {BOUND_MS} ms", "void": done.returncode != 0} | {name: found[name] for name in kept}


def wide_artifact() -> Path:
    """Return an artifact that reads 128 MiB of weights for every batch."""
    folder = WORK / "wide"
    if (folder / "manifest.json").exists():
        return folder
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((WIDTH, WIDTH), np.float32) / 64, name) for name in ("a", "b")
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("x", "y")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "wide", values[:1], values[1:], weights)
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return make_artifact(folder)
