"""Rates of accelerators that run compiled graphs, fitted on what a vendor publishes, and judged network by network.

    python benchmarks/roofline_npu.py

writes ``benchmarks/results/roofline-npu.json`` and the package's ``efficiencies_npu.toml``. Each network of the first device is
judged by rates that were fitted without it; those of the other devices by all of the first device's.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.optimize import lsq_linear
from timm.utils.model import reparameterize_model
from torchvision import models

from narrowcast.accounting.classes import OperatorClass, class_of
from narrowcast.accounting.devices import device
from narrowcast.accounting.trace import fake_module, trace

HERE = Path(__file__).parent
CLASSES = [
    OperatorClass.CONVOLUTION,
    OperatorClass.POINTWISE,
    OperatorClass.DEPTHWISE,
    OperatorClass.GROUPED,
    OperatorClass.IMAGE,
]


def flops(name, edge):
    """Return the FLOPs of each class; linear layers count as 1x1 convolutions, which compilers make of them."""
    package, _, model = name.partition(":")

    def build():
        if package == "timm":
            made = timm.create_model(model, pretrained=False)
            return reparameterize_model(made) if model.startswith("repvgg") else made
        options = {"aux_logits": False, "init_weights": False} if model == "googlenet" else {}
        return models.get_model(model, weights=None, **options)

    module, mode = fake_module(build)
    found = dict.fromkeys(CLASSES, 0.0)
    for operator in trace(module, (torch.empty(1, 3, edge, edge),), mode=mode).operators:
        if operator.work and operator.work.macs:
            kind = class_of(operator)
            found[kind if kind in found else OperatorClass.POINTWISE] += 2.0 * operator.work.macs
    return np.array([found[kind] for kind in CLASSES])


def fit(work, seconds, peak):
    """Return the share of the peak that each class reaches, by the least squares of relative errors."""
    relative = work / peak / seconds[:, None]
    return 1 / lsq_linear(relative, np.ones(len(seconds)), bounds=(1.0, np.inf)).x


def main():
    warnings.filterwarnings("ignore")
    published = tomllib.loads((HERE / "roofline_npu.toml").read_text())
    work = {name: flops(name, row[0]) for name, row in published["networks"].items()}
    first, *others = published["devices"]
    rates, rows = None, {}
    for place, name in enumerate([first, *others]):
        held = {key: 1 / row[1 + place] for key, row in published["networks"].items() if row[1 + place]}
        peak = device(name).peak("int8").tflops * 1e12
        table, seconds = np.array([work[key] for key in held]), np.array(list(held.values()))
        if rates is None:
            rates = fit(table, seconds, peak)
        for index, (key, measured) in enumerate(held.items()):
            others_of = np.arange(len(held)) != index
            judged_by = fit(table[others_of], seconds[others_of], peak) if name == first else rates
            estimate = float((work[key] / peak / judged_by).sum())
            rows[f"{key} on {name}"] = {
                "measured_ms": 1e3 * measured,
                "estimate_ms": 1e3 * estimate,
                "error": estimate / measured - 1,
            }
    ratios = {
        name: [1 / (1 + row["error"]) for key, row in rows.items() if key.endswith(f"on {name}")]
        for name in [first, *others]
    }
    summary = {
        name: {
            "networks": len(found),
            "median_absolute_error": float(np.median([abs(1 / one - 1) for one in found])),
            "largest_absolute_error": float(max(abs(1 / one - 1) for one in found)),
            "measured_over_estimate_p5": float(np.percentile(found, 5)),
            "measured_over_estimate_p95": float(np.percentile(found, 95)),
        }
        for name, found in (ratios | {"all": [one for part in ratios.values() for one in part]}).items()
    }
    shares = {str(kind): round(float(rate), 4) for kind, rate in zip(CLASSES, rates, strict=True)}
    report = {"protocol": f"published: {published['source']}", "shares": shares, "summary": summary, "networks": rows}
    (HERE / "results" / "roofline-npu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    write(shares, summary["all"])


def write(shares, band):
    """Write the package's data."""
    low, high = min(1.0, band["measured_over_estimate_p5"]), max(1.0, band["measured_over_estimate_p95"])
    lines = [
        "# What compiled graphs reach of an accelerator's peak, by class of operators. Written by benchmarks/roofline_npu.py;",
        "# see benchmarks/results/roofline-npu.json. The band holds nine of ten of the published networks.",
        "",
        "[npu-compiled]",
        'runtime = "compiled"',
        "operator_us = 0.0",
        f"low = {low:.2f}",
        f"high = {high:.2f}",
        f'source = "published: Hailo Model Zoo, {band["networks"]} networks on Hailo-8 and Hailo-8L, INT8, '
        'throughput of a full pipeline; other accelerators were not looked at"',
        "",
        "[npu-compiled.classes]",
        *(f"{json.dumps(name)} = {{ compute = {share} }}" for name, share in shares.items()),
        f'"matrix product" = {{ compute = {shares["pointwise convolution"]} }}',
    ]
    target = HERE.parent / "src" / "narrowcast" / "accounting" / "efficiencies_npu.toml"
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
