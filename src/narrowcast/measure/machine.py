"""This machine as a device of the catalogue, measured: bandwidth, products, and what runtimes reach of both."""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from narrowcast.accounting.classes import OperatorClass
from narrowcast.accounting.devices import FAMILIES, Accumulator, Device, Launch, Memory, Peak
from narrowcast.accounting.efficiencies import RuntimeModel, runtime_model
from narrowcast.errors import RuntimeMissingError
from narrowcast.measure.environment import environment
from narrowcast.measure.probes import Sample, host_times
from narrowcast.measure.probes_onnx import blocks, node_seconds, options_of, run_block
from narrowcast.measure.rates import fit

__all__ = ["CudaNumbers", "cpu_device", "cuda_device", "measure_cpu", "measure_cuda"]

#: Rows and columns of the square products that peaks are measured with.
_SQUARE = 1024
#: Numbers of the arrays that are copied: more than caches hold.
_COPIED = 64 << 20
#: Instructions that multiply in a format; without them a product is emulated, and no peak.
_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm"),
    "fp16": ("avx512_fp16",),
}

#: Formats whose products are tried on CUDA, and what they sum in.
_CUDA_FORMATS: dict[str, Accumulator] = {
    "fp32": "fp32",
    "tf32": "fp32",
    "fp16": "fp32",
    "bf16": "fp32",
    "fp8": "fp32",
    "int8": "int32",
}

Progress = Callable[[str, float], None]


def _silent(stage: str, share: float) -> None:
    """Tell nobody."""


def measure_cpu(*, threads: int | None = None, progress: Progress = _silent) -> Device:
    """Return this machine's processor as the device ``auto``, with what ONNX Runtime reaches on it.

    Takes under a minute on an idle machine; on a busy one the numbers are too low.

    Args:
        threads: Of ONNX Runtime and of copies; all cores unless given.
        progress: Called with what is being measured and the share that is done.
    """
    threads = threads or environment().cores
    progress("memory", 0.0)
    copied = _copy_bandwidth(threads)
    progress("products", 0.1)
    products = _products(threads)
    samples: list[Sample] = []
    for place, block in enumerate(blocks()):
        progress(block.name, min(0.8, 0.2 + 0.02 * place))
        samples += run_block(block, threads=threads)
    progress("small nodes", 0.8)
    node = node_seconds(threads=threads)
    progress("rates", 0.85)
    return cpu_device(threads, copied, products, samples, node)


def cpu_device(
    threads: int, copied: float, products: dict[str, float], samples: Sequence[Sample], node: float
) -> Device:
    """Return the device that measurements make.

    Args:
        threads: That everything ran with.
        copied: Bytes per second of a copy, read and written.
        products: FLOP/s of large products by format.
        samples: What ONNX Runtime's probes took.
        node: Seconds that each node costs.
    """
    found = environment()
    peak = max(products["fp32"], *(2.0 * sample.case.macs / sample.seconds for sample in samples))
    bandwidth = max(copied, _read_bandwidth(samples))
    cache = _cache_bytes()
    source = (
        f"measured: {datetime.date.today().isoformat()}, ONNX Runtime {ort.__version__}, {threads} threads, "
        f"load {found.load} before"
    )
    band = runtime_model("cpu", "onnxruntime")
    runtime = RuntimeModel(
        runtime="onnxruntime",
        operator_us=_rounded(node * 1e6),
        low=band.low,
        high=band.high,
        classes=fit(samples, peak=peak, bandwidth=bandwidth, cache=cache),
        source=f"{source}; {len(samples)} operators in blocks of networks",
    )
    rates = {"fp32": peak} | {
        dtype: rate
        for dtype, rate in products.items()
        if dtype != "fp32" and set(_INSTRUCTIONS[dtype]) & set(found.instructions)
    }
    return Device(
        name="auto",
        title=f"this machine, {found.processor or 'unknown processor'}, {threads} threads",
        vendor=_vendor(found.processor),
        kind="cpu",
        architecture=", ".join(found.instructions) or "not known",
        year=datetime.date.today().year,
        formats=tuple(rates),
        memory=Memory(
            size_gb=_rounded(found.memory_bytes / 2**30),
            stated_gbs=_rounded(bandwidth / 1e9),
            source=f"{source}: the faster of a copy and of reading weights",
            cache_mb=cache / 2**20 or None,
        ),
        peaks=tuple(
            Peak(
                dtype=dtype,
                accumulator="int32" if dtype == "int8" else "fp32",
                unit="vector",
                tflops=_rounded(rate / 1e12),
                source=f"{source}: the fastest of all products and convolutions tried",
            )
            for dtype, rate in rates.items()
        ),
        runtimes=(runtime,),
        source=source,
        notes="The year is that of the measurement.",
    )


class CudaNumbers(NamedTuple):
    """What was measured of a GPU.

    Args:
        name: As its driver gives it.
        capability: CUDA's compute capability.
        memory_bytes: Of its memory.
        cache_bytes: Of its second-level cache.
        bandwidth: Bytes per second of a copy, read and written.
        products: FLOP/s of large products by format.
        launch: Seconds from one kernel to the next where the host has no part.
        dispatch: Seconds that the host needs for one small eager operator.
        samples: What probes took, all in one format.
        probed: That format.
        torch: PyTorch's version.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    cache_bytes: int
    bandwidth: float
    products: dict[str, float]
    launch: float
    dispatch: float
    samples: Sequence[Sample]
    probed: str
    torch: str


def measure_cuda(*, progress: Progress = _silent) -> Device:
    """Return this machine's first CUDA device as ``auto-cuda``, with what eager PyTorch reaches on it.

    Raises:
        RuntimeMissingError: PyTorch is not installed, or sees no CUDA device.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise RuntimeMissingError(
            "measuring a CUDA device needs PyTorch", next_step="install it with: pip install 'narrowcast[torch]'"
        ) from error
    if not torch.cuda.is_available():
        raise RuntimeMissingError("PyTorch sees no CUDA device here", allowed="narrowcast devices --measure cpu")
    probes: Any = importlib.import_module("narrowcast.measure.probes_torch")
    progress("memory", 0.0)
    bandwidth = max(probes.copy_bandwidth("cuda", numbers) for numbers in (1 << 26, 1 << 28))
    progress("products", 0.05)
    products = {
        dtype: max(rates)
        for dtype in _CUDA_FORMATS
        if (rates := [rate for size in (4096, 8192) if (rate := probes.product_peak("cuda", dtype, size))])
    }
    progress("launches", 0.1)
    launch, dispatch = probes.launch_seconds(), probes.dispatch_seconds("cuda")
    probed = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cases, samples = list(probes.gpu_cases()), []
    for place, case in enumerate(cases):
        progress(f"{case.kind}", 0.1 + 0.8 * place / len(cases))
        samples.append(probes.run_case(case, {"bf16": torch.bfloat16, "fp16": torch.float16}[probed], "cuda"))
    progress("rates", 0.9)
    about = torch.cuda.get_device_properties(0)
    return cuda_device(
        CudaNumbers(
            about.name,
            (about.major, about.minor),
            about.total_memory,
            about.L2_cache_size,
            bandwidth,
            products,
            launch,
            dispatch,
            samples,
            probed,
            torch.__version__,
        )
    )


def cuda_device(found: CudaNumbers) -> Device:
    """Return the device that measurements make; what each operator costs the host is scaled from ``gpu-torch``."""
    packaged = runtime_model("gpu", "torch")
    fastest = max(2.0 * sample.case.macs / sample.seconds for sample in found.samples)
    products = found.products | {found.probed: max(found.products[found.probed], fastest)}
    source = f"measured: {datetime.date.today().isoformat()}, PyTorch {found.torch}"
    rates = fit(
        found.samples,
        peak=products[found.probed],
        bandwidth=found.bandwidth,
        cache=found.cache_bytes,
        parallel=True,
    )
    runtime = packaged.model_copy(
        update={
            "operator_us": _rounded(found.dispatch * 1e6),
            "classes": {
                kind: one.model_copy(update={"host": packaged.rates(kind).host}) for kind, one in rates.items()
            },
            "source": f"{source}; {len(found.samples)} probes in {found.probed}, host costs scaled from the package's",
        }
    )
    formats = [member for dtype in products for member in FAMILIES.get(dtype, (dtype,))[:2]]
    return Device(
        name="auto-cuda",
        title=f"this machine, {found.name}",
        vendor="NVIDIA",
        kind="gpu",
        architecture="not known",
        capability=found.capability,
        year=datetime.date.today().year,
        formats=tuple(formats),
        memory=Memory(
            size_gb=_rounded(found.memory_bytes / 2**30),
            stated_gbs=_rounded(found.bandwidth / 1e9),
            source=f"{source}: a copy, read and written",
            cache_mb=_rounded(found.cache_bytes / 2**20),
        ),
        peaks=tuple(
            Peak(
                dtype=dtype,
                accumulator=_CUDA_FORMATS[dtype],
                unit="vector" if dtype == "fp32" else "tensor core",
                tflops=_rounded(rate / 1e12),
                source=f"{source}: the fastest product tried",
            )
            for dtype, rate in products.items()
        ),
        launch=Launch(microseconds=_rounded(found.launch * 1e6), source=f"{source}: kernels of a CUDA graph"),
        runtimes=(runtime,),
        source=source,
        notes="The year is that of the measurement.",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _vendor(processor: str) -> str:
    known = ("AMD", "Intel", "Apple", "ARM")
    return next((name for name in known if name.casefold() in processor.casefold()), "not known")


def _copy_bandwidth(threads: int, *, rounds: int = 7) -> float:
    """Return the bytes per second that copies read and write, all threads together."""
    source, target = np.zeros(_COPIED, np.float32), np.zeros(_COPIED, np.float32)
    parts = [slice(_COPIED * place // threads, _COPIED * (place + 1) // threads) for place in range(threads)]

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])  # numpy releases the interpreter's lock

    with ThreadPoolExecutor(threads) as pool:
        times = host_times(lambda: list(pool.map(copy, parts)), rounds)
    return 2 * source.nbytes / min(times)


def _read_bandwidth(samples: Iterable[Sample]) -> float:
    """Return the bytes per second at which products of one row read weights that no cache holds."""
    large = [sample for sample in samples if sample.case.weights * sample.number_bytes > 2 * _cache_bytes()]
    rows = [sample for sample in large if sample.case.kind is OperatorClass.PRODUCT]
    return max((sample.case.weights * sample.number_bytes / sample.seconds for sample in rows), default=0.0)


def _cache_bytes() -> int:
    """Return the size of the largest cache; 0 where the system does not say."""
    sizes: list[int] = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=0)


def _products(threads: int, *, rounds: int = 9) -> dict[str, float]:
    """Return the FLOP/s of square products by format, the fastest of ``rounds``."""
    size = _SQUARE
    rng = np.random.default_rng(0)
    real = rng.standard_normal((size, size), np.float32)
    calls: dict[str, Callable[[], Any]] = {
        "fp32": _product("MatMul", {"a": real, "b": real}, TensorProto.FLOAT, threads),
        "int8": _product(
            "MatMulInteger",
            {"a": rng.integers(0, 255, (size, size), np.uint8), "b": rng.integers(-100, 100, (size, size), np.int8)},
            TensorProto.INT32,
            threads,
        ),
    }
    half = _torch_product("bfloat16", threads)
    if half is not None:
        calls["bf16"] = half
    return {dtype: 2.0 * size**3 / min(host_times(call, rounds)) for dtype, call in calls.items()}


def _product(kind: str, inputs: dict[str, Any], out: int, threads: int) -> Callable[[], Any]:
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(kind, list(inputs), ["c"])], kind, given, [helper.make_tensor_value_info("c", out, None)]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), options_of(threads), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def _torch_product(dtype: str, threads: int) -> Callable[[], Any] | None:
    """Return a product that PyTorch makes; None where PyTorch is not installed."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return None
    x = torch.randn(_SQUARE, _SQUARE).to(getattr(torch, dtype))

    def call() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.mm(x, x)
        torch.set_num_threads(before)

    return call
