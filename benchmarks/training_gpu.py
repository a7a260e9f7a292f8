"""Training on a GPU: our step beside a loop written by hand, precisions beside each other, and our update beside PyTorch's.

python benchmarks/training_gpu.py check
python benchmarks/training_gpu.py speed --model gpt|wide|resnet [--precisions ...] [--modes eager blocks compiled]
python benchmarks/training_gpu.py update
python benchmarks/training_gpu.py curves [--precisions ...]

Each writes training-gpu-NAME.json into --out ($OUT or benchmarks/results unless given), after every case. A case that fails
is written down with its error. Modes: as it is, each transformer block compiled (quick, as all share one compilation), the
whole model compiled. With --tiny --device cpu everything runs small, to try the script.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn
from training_loops import Ours, Plain, Watched, loss_itself, optimizer_of
from training_models import text_workload, workloads
from training_text import collected_text

from narrowcast.training.census import Census
from narrowcast.training.fused import FusedAdamW
from narrowcast.training.gradients import Gradients
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.trainer import Trainer
from narrowcast.training.updates import never, update_for

HERE = Path(__file__).parent
PRECISIONS = {
    "gpt": ["tf32", "bf16-mixed", "fp16-mixed", "fp32", "fp8-mixed"],
    "wide": ["bf16-mixed", "fp8-mixed"],
    "resnet": ["tf32", "bf16-mixed", "fp16-mixed", "fp32"],
}
CLIP = 1.0
ROUND_SECONDS = 0.5  # what one loop runs for in a round, about


# What all share


class Report:
    """A JSON file that grows case by case."""

    def __init__(self, name, options, protocol):
        self.path = Path(options.out) / f"training-gpu-{name}.json"
        self.content = {"environment": environment(options.device), "protocol": protocol, "cases": {}}

    @contextlib.contextmanager
    def case(self, name):
        """Give a dictionary for a case's results; an error becomes part of it, and the run goes on."""
        found, start = {}, time.perf_counter()
        print(f"- {name}", flush=True)
        try:
            yield found
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"  failed: {traceback.format_exc()[-1500:]}", flush=True)
        found["case_s"] = round(time.perf_counter() - start, 1)
        self.content["cases"][name] = found
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        cleared()


def environment(device):
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {"device": "CPU", "cores": os.cpu_count()}
    for name in ("triton", "torchao"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        asked = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        with contextlib.suppress(OSError):
            found["driver, clocks, power limit"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return found


def cleared():
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def waited(device):
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values):
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": median(values), "p10": tenths[0], "p90": tenths[-1], "all": [round(value, 5) for value in values]}


@contextlib.contextmanager
def compiled_for(precision):
    """Keep what is compiled for a precision to it: PyTorch 2.11 may run BF16's code in FP16, unless a loop prevents it."""
    with torch.compiler.config.patch(cache_key_tag=precision):
        yield


def set_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


# How fast a step is


def loop_of(kind, workload, precision, mode, options):
    """Return a loop with its own model; the same numbers for every kind."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = workload.build()
    optimizer = optimizer_of(workload, model.parameters(), options.optimizer if issubclass(kind, Ours) else "torch")
    loop = kind(model, optimizer, precision, options.device, CLIP)
    # In place, and at the first call: after any conversion.
    if mode == "compiled":
        model.compile()
    if mode == "blocks":
        for block in model.blocks:
            block.compile()
    return loop


def bytes_of(loop):
    """Return what a loop holds between steps; none keeps its gradients."""
    state = [x for one in loop.optimizer.state.values() for x in one.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in (*loop.model.parameters(), *loop.model.buffers(), *state))


def timed(loop, batches, steps, device):
    """Return seconds per step, with the device at rest before and after."""
    waited(device)
    start = time.perf_counter()
    for _ in range(steps):
        loop.step(next(batches))
    waited(device)
    return (time.perf_counter() - start) / steps


def run_speed(options):
    workload = workloads(options.tiny, options.batch)[options.model]
    report = Report(
        f"speed-{options.model}{options.label}",
        options,
        f"Rounds of about {ROUND_SECONDS} s: all three loops run in each, in turns first; the device at rest before and after. "
        "Quantiles over rounds; a ratio is taken within a round. Peak memory of a loop: what was allocated at most while it "
        "ran, less what the other loops hold. ours: nothing watches; watched: with the doctor at its cheap level. "
        "Four batches on the device, taken in turn; clipping to 1.0 in both.",
    )
    report.content["workload"] = {"model": options.model, **workload.about, "optimizer": options.optimizer}
    batches = itertools.cycle([workload.batch(options.device) for _ in range(4)])
    for mode, precision in itertools.product(options.modes, options.precisions or PRECISIONS[options.model]):
        with report.case(f"{precision} {mode}") as found:
            set_tf32(precision == "tf32")
            with compiled_for(precision):
                compare_loops(found, workload, precision, mode, batches, options)
    return report


def compare_loops(found, workload, precision, mode, batches, options):
    device = options.device
    loops = {"plain": loop_of(Plain, workload, precision, mode, options)}
    loops["ours"] = loop_of(Ours, workload, precision, mode, options)
    loops["watched"] = loop_of(Watched, workload, precision, mode, options)
    found["parameters"] = sum(x.numel() for x in loops["ours"].model.parameters())
    for name, loop in loops.items():
        found[f"{name}: first step s"] = round(timed(loop, batches, 1, device), 2)
        timed(loop, batches, 2, device)
    steps = max(1, round(ROUND_SECONDS / timed(loops["plain"], batches, 2, device)))
    steps = min(steps, 50)
    peak = dict.fromkeys(loops, 0)
    seconds = {name: [] for name in loops}
    for turn in range(options.rounds):
        for name in list(loops)[:: 1 if turn % 2 else -1]:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(timed(loops[name], batches, steps, device))
            if device == "cuda":
                others = sum(bytes_of(loop) for its, loop in loops.items() if its != name)
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() - others)
    for name in loops:
        found[name] = {
            f"{workload.unit}_per_s": workload.count / median(seconds[name]),
            "seconds_per_step": spread(seconds[name]),
            "peak_gib": round(peak[name] / 2**30, 3),
            "loss_after": float(loops[name].step(next(batches))),
        }
    for name in ("ours", "watched"):
        ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["plain"], strict=True)]
        found[f"{name}_over_plain"] = spread(ratios)
        found[name]["skipped"] = loops[name].trainer.skipped
    found["steps_per_round"] = steps
    rate = found["ours"][f"{workload.unit}_per_s"]
    print(
        f"  {rate:,.0f} {workload.unit}/s, {found['ours']['peak_gib']} GiB; time over plain "
        f"{found['ours_over_plain']['median']:.4f} ({found['ours_over_plain']['p10']:.4f}-"
        f"{found['ours_over_plain']['p90']:.4f}), watched {found['watched_over_plain']['median']:.4f}; "
        f"memory {found['plain']['peak_gib']} GiB plain",
        flush=True,
    )


# How fast an update is


def update_cases(parameters, device):
    """Return calls by name, each a whole update; gradients stay what they are but for rounding."""
    scaler = torch.amp.GradScaler(device, init_scale=1.0, growth_interval=1 << 30)
    scaler.scale(torch.zeros((), device=device))
    torchs = {
        name: torch.optim.AdamW(parameters, lr=1e-6, fused=True) for name in ("scaled", "clipped", "bare", "told")
    }
    ours = FusedAdamW(parameters, lr=1e-6)
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    told, loss = update_for(torchs["told"], 1e6, None, lambda _left_out: None), torch.zeros((), device=device)

    def scaled():
        scaler.unscale_(torchs["scaled"])
        nn.utils.clip_grad_norm_(parameters, 1e6)
        scaler.step(torchs["scaled"])
        scaler.update()

    def clipped():
        nn.utils.clip_grad_norm_(parameters, 1e6)
        torchs["clipped"].step()

    cases = {
        **({} if parameters[0].dtype is torch.bfloat16 else {"torch: unscale, clip, AdamW": scaled}),
        "torch: clip, AdamW": clipped,
        "torch: norm, AdamW that unscales and clips": lambda: told(
            Gradients(named, torch.device(device)), 1.0, loss, Census(tuple(named), loss, None, {}, False), never
        ),
        "torch: AdamW alone": torchs["bare"].step,
        "ours: unscale, clip, AdamW": lambda: ours.update(1.0, 1e6),
        "ours: unscale, AdamW": lambda: ours.update(1.0, None),
    }
    for rounding in ("stochastic", "kahan"):
        if parameters[0].dtype is torch.bfloat16:
            one = FusedAdamW(parameters, lr=1e-6, rounding=rounding)
            cases[f"ours: unscale, clip, AdamW, {rounding}"] = lambda one=one: one.update(1.0, 1e6)
    return cases


def time_call(call, device):
    """Return device and host milliseconds of a call; the device is busy first, so that the host keeps ahead."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3, (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)
    begin.record()
    start = time.perf_counter()
    call()
    host = (time.perf_counter() - start) * 1e3
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), host


def with_gradients(workload, dtype, device):
    """Return a model's parameters with gradients; calls are timed outside the context that puts tensors on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        parameters = list(workload.build().to(dtype).parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def run_update(options):
    report = Report(
        f"update{options.label}",
        options,
        f"{options.rounds} rounds, each running every call once; milliseconds by CUDA events, the device kept busy for some "
        "2.5 ms before each so that the host keeps ahead; host: what a call takes the host (GradScaler's waits for the "
        "device). FP32 gradients for FP32 parameters, BF16 for BF16. bytes: what ours reads and writes.",
    )
    for name, dtype in itertools.product(("gpt", "resnet"), (torch.float32, torch.bfloat16)):
        with report.case(f"{name} {str(dtype)[6:]}") as found:
            parameters = with_gradients(workloads(options.tiny)[name], dtype, options.device)
            calls = update_cases(parameters, options.device)
            for call in calls.values():
                for _ in range(3):
                    call()
            times = {name: [] for name in calls}
            for _ in range(options.rounds):
                for what, call in calls.items():
                    times[what].append(time_call(call, options.device))
            count = sum(x.numel() for x in parameters)
            size = parameters[0].element_size()
            found |= {"parameters": count, "tensors": len(parameters), "bytes": count * (4 * size + 16)}
            for what, pairs in times.items():
                device_ms, host_ms = zip(*pairs, strict=True)
                found[what] = {"ms": spread(device_ms), "host_ms": spread(host_ms)}
                print(f"  {what:46} {median(device_ms):8.3f} ms, host {median(host_ms):7.3f} ms", flush=True)
            mine = found["ours: unscale, clip, AdamW"]["ms"]["median"]
            for what in [name for name in calls if name.startswith("torch") and name != "torch: AdamW alone"]:
                found[f"ours over {what}"] = mine / found[what]["ms"]["median"]
                print(f"  ours over {what}: {found[f'ours over {what}']:.3f}", flush=True)
            found["gb_per_s"] = found["bytes"] / mine / 1e6
            print(f"  {found['gb_per_s']:.0f} GB/s", flush=True)
    if options.tune:
        tune(report, options)
    return report


def tune(report, options):
    """Time the kernels' shapes: how the constants of triton_adamw were chosen."""
    from narrowcast.training import triton_adamw

    before = triton_adamw._CHUNK, triton_adamw._TILE, triton_adamw._WARPS
    for dtype in (torch.float32, torch.bfloat16):
        with report.case(f"shapes for {str(dtype)[6:]}") as found:
            parameters = with_gradients(workloads(options.tiny)["gpt"], dtype, options.device)
            rounding = "stochastic" if dtype is torch.bfloat16 else "nearest"
            for chunk, (tile, warps) in itertools.product(
                (8192, 16384, 65536), ((512, 4), (1024, 4), (2048, 4), (1024, 8), (2048, 8))
            ):
                triton_adamw._CHUNK, triton_adamw._TILE, triton_adamw._WARPS = chunk, tile, warps
                one = FusedAdamW(parameters, lr=1e-6, rounding=rounding)
                for _ in range(3):
                    one.update(1.0, 1e6)
                taken = [time_call(lambda one=one: one.update(1.0, 1e6), options.device)[0] for _ in range(10)]
                found[f"chunk {chunk}, tile {tile}, {warps} warps"] = median(taken)
                print(f"  chunk {chunk:6} tile {tile:5} warps {warps}: {median(taken):.3f} ms", flush=True)
                del one
    triton_adamw._CHUNK, triton_adamw._TILE, triton_adamw._WARPS = before


# Whether losses agree on real text


def run_curves(options):
    report = Report(
        f"curves{options.label}",
        options,
        "The same weights and batches for every precision; the learning rate rises over 50 steps to 3e-4. held_out: the loss, "
        "computed in FP32, on the same samples of text that no step sees, every 10 steps. apart: a loss over fp32's, less "
        "one: of single batches, of means over 10 steps, and held out; a skipped update counts as a step. fp32 again: half "
        "of the weights begin one place off in the last bit, which says what chance alone does.",
    )
    size = (2, 64, 4, 32, 256, 4) if options.tiny else (8, 768, 12, 512, 256, 32)
    steps = 12 if options.tiny else 300
    workload = text_workload(*size)
    text, about = collected_text(1 << 18 if options.tiny else 1 << 25)
    report.content |= {"workload": workload.about | {"steps": steps}, "text": about}
    print(json.dumps(about), flush=True)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(options.device)
    wanted = None
    for name in options.precisions or ["fp32", "fp32 again", "bf16-mixed", "fp16-mixed", "tf32"]:
        with report.case(name) as found:
            set_tf32(False)
            start = time.perf_counter()
            found |= one_curve(workload, data, steps, name, options)
            found["seconds"] = round(time.perf_counter() - start, 1)
            wanted = wanted or found
            found["apart"] = apart(found, wanted)
            print(f"  {found['losses'][0]:.3f} -> {found['losses'][-1]:.4f}; {found['apart']}", flush=True)
    return report


def one_curve(workload, data, steps, name, options):
    torch.manual_seed(0)
    with torch.device(options.device):
        model = workload.build()
    if name == "fp32 again":
        move_half(model)
    optimizer = FusedAdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    precision = name.split()[0]
    trainer = Trainer(model, optimizer, loss_itself, precision=precision, clip_norm=CLIP, schedule=schedule, watch=None)
    random = torch.Generator().manual_seed(1)
    batch, length = workload.about["batch"], workload.about["length"]
    unseen = len(data) // 20
    seen, kept = data[:-unseen], data[-unseen:]
    fixed = [drawn(kept, batch, length, random) for _ in range(8)]
    losses, held_out = [], []
    for step in range(steps):
        inputs = drawn(seen, batch, length, random)
        info = trainer.step((inputs, inputs[1]))
        losses.append(info.mean_loss)
        if step % 10 == 9:
            with torch.no_grad():
                held_out.append(float(sum(model(*one) for one in fixed) / len(fixed)))
    losses = [round(float(loss), 5) for loss in losses]
    return {"losses": losses, "held_out": held_out, "skipped": trainer.skipped}


def drawn(data, batch, length, random):
    """Return samples from anywhere in a text: the bytes, and those that follow each."""
    starts = torch.randint(0, len(data) - length - 1, (batch, 1), generator=random)
    rows = data[(starts + torch.arange(length + 1)).to(data.device)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@torch.no_grad()
def move_half(model):
    """Move every second weight to the next number up."""
    for one in model.parameters():
        flat = one.view(-1)[::2]
        flat.copy_(torch.nextafter(flat, torch.full_like(flat, torch.inf)))


def apart(found, wanted):
    """Return how far losses lie apart at most, as shares of those wanted."""

    def worst(mine, its):
        return max(abs(one / other - 1) for one, other in zip(mine, its, strict=True))

    def tens(losses):
        return [sum(losses[at : at + 10]) / 10 for at in range(max(1, len(losses) - 9))]

    return {
        "batch": worst(found["losses"], wanted["losses"]),
        "mean of 10": worst(tens(found["losses"]), tens(wanted["losses"])),
        "held out": worst(found["held_out"], wanted["held_out"]),
    }


# Whether it is right


def run_check(options):
    """Hold the kernels to the reference, and compile in each precision with PyTorch's settings as they are at the start."""
    report = Report("check", options, "")
    script = HERE.parent / "tests" / "unit" / "training" / "adamw_kernels.py"
    with report.case("kernels against the reference") as found:
        ran = subprocess.run([sys.executable, script, options.device], capture_output=True, text=True, timeout=400)
        print(ran.stdout[-3000:], ran.stderr[-2000:], flush=True)
        found["output"] = ran.stdout[-3000:]
        if ran.returncode:
            raise AssertionError("the kernels differ from the reference")
    workload = text_workload(2, 256, 4, 128, 512, 4)
    for precision, mode in itertools.product(PRECISIONS["gpt"], options.modes):
        with report.case(f"{precision} {mode}, settings untouched") as found:
            policy_of(precision).check(torch.device(options.device))
            loop = loop_of(Ours, workload, precision, mode, options)
            batch = workload.batch(options.device)
            found["losses"] = [float(loop.step(batch)) for _ in range(8)]
            if not found["losses"][-1] < found["losses"][0]:
                raise AssertionError(f"the loss does not fall: {found['losses']}")
            print(f"  {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f}", flush=True)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "speed", "update", "curves"))
    parser.add_argument("--model", choices=("gpt", "wide", "resnet"), default="gpt")
    parser.add_argument("--precisions", nargs="+")
    parser.add_argument("--modes", nargs="+", choices=("eager", "blocks", "compiled"), default=["eager"])
    parser.add_argument("--optimizer", choices=("torch", "fused"), default="torch", help="of our loop, for text")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tune", action="store_true", help="with update: also time the kernels' shapes")
    parser.add_argument("--label", default="", help="added to the file's name")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=os.environ.get("OUT", str(HERE / "results")))
    options = parser.parse_args()
    start = time.perf_counter()
    run = {"check": run_check, "speed": run_speed, "update": run_update, "curves": run_curves}[options.what]
    torch.backends.cudnn.benchmark = True
    report = run(options)
    failed = [name for name, case in report.content["cases"].items() if "error" in case]
    print(f"{report.path}, {time.perf_counter() - start:.0f} s; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed) and options.what == "check")


if __name__ == "__main__":
    main()
