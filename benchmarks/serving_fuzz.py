"""Ten minutes of requests that nobody meant: nothing may crash the server, and nothing may be answered 500.

    python benchmarks/serving_fuzz.py document [--minutes 10]
    python benchmarks/serving_fuzz.py parser [--minutes 10] [--corpus FOLDER]

``document`` starts a server and lets schemathesis ask it for everything that its OpenAPI document allows and forbids, and
writes what came of it to benchmarks/results/serving-fuzz.json.
``parser`` lets atheris, a fuzzer that is guided by coverage, change the bytes of requests with binary data, and reads them as
the server does. Atheris is no dependency: ``pip install atheris``.

Either ends with exit code 1 when something was found.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from narrowcast.measure.environment import environment

HERE = Path(__file__).parent
RESULT = HERE / "results" / "serving-fuzz.json"
#: Names that are asked for; the document says only that they are texts.
NAMES = {"name": ["noop", "large", "none"], "version": ["1", "2", "x"]}
#: The same for the fields of requests, by schema: others would hardly ever be those of a tensor.
FIELDS = {
    "Input": {"name": ["x", "none"], "datatype": ["FP32", "BF16", "BYTES"]},
    "WantedOutput": {"name": ["y", "none"]},
}
#: What fits the document may still have a shape or type that the model does not take, and is refused then.
EXCLUDED_CHECKS = "positive_data_acceptance"


def fuzz_document(minutes: float) -> int:
    """Run schemathesis on a server of its own, and return its exit code."""
    from serving import running

    os.environ["NARROWCAST_ADMIN_TOKEN"] = "token"
    with (
        running([sys.executable, HERE / "serving_programs.py", "inline", "0"]) as server,
        TemporaryDirectory() as folder,
    ):
        url = f"http://127.0.0.1:{server.ports['http']}"
        with urllib.request.urlopen(f"{url}/openapi.json") as answer:
            document = json.load(answer)
        for item in document["paths"].values():
            for parameter in item.get("parameters", ()):
                parameter["schema"] |= {"enum": NAMES[parameter["name"]]} if parameter["name"] in NAMES else {}
        for schema, fields in FIELDS.items():
            for field, values in fields.items():
                document["components"]["schemas"][schema]["properties"][field] = {"enum": values}
        place = Path(folder) / "openapi.json"
        place.write_text(json.dumps(document))
        command = [Path(sys.executable).parent / "schemathesis", "run", place, "--url", url]
        command += ["--header", "Authorization: Bearer token"]
        command += [
            "--exclude-checks",
            EXCLUDED_CHECKS,
            "--max-time",
            str(round(minutes * 60)),
            "--continue-on-failure",
            *("--report", "json", "--report-json-path", "report.json"),
        ]
        code = subprocess.run(command, check=False, cwd=folder).returncode
        with urllib.request.urlopen(f"{url}/v2/health/live") as answer:
            assert answer.status == 200
        write_result(json.loads((Path(folder) / "report.json").read_text()))
    return code


def write_result(report: dict[str, Any]) -> None:
    """Keep what a run of schemathesis says of itself, and on what it ran."""
    kept = (
        "started_at",
        "running_time",
        "stop_reason",
        "seed",
        "operations",
        "phases",
        "test_cases",
        "failures",
        "errors",
    )
    result = {
        "schemathesis": report["schemathesis_version"],
        "excluded_checks": EXCLUDED_CHECKS,
        **{name: report[name] for name in kept},
        "environment": environment().model_dump(mode="json"),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def fuzz_parser(minutes: float, corpus: Path) -> None:
    """Run atheris on the reader of requests; it ends the process at the first thing that it finds, or in the end."""
    import atheris

    with atheris.instrument_imports(include=["narrowcast"]):
        from narrowcast.oip.datatypes import DATATYPES
        from narrowcast.serving.limits import Limits
        from narrowcast.serving.protocol.requests import read_infer
        from narrowcast.serving.protocol.responses import infer_response
        from narrowcast.serving.refusals import Refusal
        from narrowcast.serving.shared_memory import SharedMemory
        from narrowcast.serving.signature import Signature, TensorSpec

    names = ("FP32", "BYTES", "BOOL", "BF16", "INT64")
    specs = tuple(TensorSpec(name.lower(), DATATYPES[name], (-1, 2)) for name in names)
    signatures = [Signature(specs, specs, batched=True)] + [Signature((spec,), (spec,), True) for spec in specs]
    limits, shared = Limits(), SharedMemory(allowed=False)

    def one(data: bytes) -> None:
        """Byte 0 chooses the model, and whether what follows is a request or what one is composed of."""
        if len(data) < 3:
            return
        signature = signatures[data[0] % len(signatures)]
        if data[0] & 0x80:
            body, length = composed(atheris.FuzzedDataProvider(data[1:]), [spec.name for spec in specs])
        else:
            body, length = data[3:], struct.unpack_from("<H", data, 1)[0]
        try:
            request = read_infer(body, None if length == 0xFFFF else length, signature, limits, shared)
            assert all(request.inputs[spec.name].dtype == spec.datatype.dtype for spec in signature.inputs)
            assert signature.check(request.inputs) == request.rows
            response = infer_response("m", "1", request, request.inputs, shared)
            json.loads(bytes(response.body[0]))
        except Refusal as refusal:
            if not (400 <= refusal.status < 500 or refusal.status == 501):
                raise

    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(specs)):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={round(minutes * 60)}",
            "-max_len=1024",
            f"-artifact_prefix={corpus}/",
            str(corpus),
        ],
        one,
    )
    atheris.Fuzz()


def composed(source: Any, names: list[str]) -> tuple[bytes, int]:
    """Return a body and the length of its JSON: good JSON about tensors that may be anything."""

    def one_of(*values: Any) -> Any:
        return values[source.ConsumeIntInRange(0, len(values) - 1)]

    def number() -> Any:
        return one_of(0, 1, 2, 3, 4, 8, 16, -1, 2**31, 2**63, 1.5, None, True, source.ConsumeInt(8))

    def values() -> Any:
        return [one_of(number(), "a", [number(), number()], source.ConsumeFloat()) for _ in range(one_of(0, 1, 2, 4))]

    inputs: list[dict[str, Any]] = []
    for _ in range(source.ConsumeIntInRange(0, 6)):
        item: dict[str, Any] = {"name": one_of(*names, "none"), "shape": [one_of(1, number()), one_of(2, number())]}
        item["datatype"] = one_of(item["name"].upper(), item["name"].upper(), "FP16", None)
        if source.ConsumeBool():
            item["parameters"] = {one_of("binary_data_size", "shared_memory_region", "other"): number()}
        if source.ConsumeBool():
            item["data"] = values()
        inputs.append(item)
    document: dict[str, Any] = {"inputs": inputs}
    if source.ConsumeBool():
        document["outputs"] = [{"name": one_of(*names), "parameters": {"binary_data": one_of(True, False, number())}}]
    if source.ConsumeBool():
        document["parameters"] = {one_of("priority", "timeout", "binary_data_output", "sequence_id"): number()}
    head = json.dumps(document).encode()
    off = one_of(0, 0, 0, 1, -1)
    return head + source.ConsumeBytes(source.remaining_bytes()), max(1, len(head) + off)


def seeds(specs: Any) -> list[bytes]:
    """Return good requests to begin with: one tensor of each type as bytes, all of them, and one as JSON."""
    given = {
        "fp32": struct.pack("<2f", 1, 2),
        "bytes": b"\x01\0\0\0a\x02\0\0\0bc",
        "bool": b"\0\x01",
        "bf16": b"\0\0\x80\x3f",
        "int64": struct.pack("<2q", -1, 2),
    }

    def request(model: int, names: list[str]) -> bytes:
        inputs = [
            {
                "name": spec.name,
                "shape": [1, 2],
                "datatype": spec.datatype.name,
                "parameters": {"binary_data_size": len(given[spec.name])},
            }
            for spec in specs
            if spec.name in names
        ]
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        return bytes([model]) + struct.pack("<H", len(head)) + head + b"".join(given[name] for name in names)

    text = {"inputs": [{"name": "fp32", "shape": [1, 2], "datatype": "FP32", "data": [[1, 2.5]]}], "id": "7"}
    single = [request(number, [spec.name]) for number, spec in enumerate(specs, 1)]
    return [*single, request(0, list(given)), b"\x01\xff\xff" + json.dumps(text).encode()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("document", "parser"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--corpus", type=Path, default=HERE / "fuzz.work", help="inputs that reached new code")
    arguments = parser.parse_args()
    if arguments.part == "document":
        sys.exit(fuzz_document(arguments.minutes))
    fuzz_parser(arguments.minutes, arguments.corpus)


if __name__ == "__main__":
    main()
