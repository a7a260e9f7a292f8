"""A module and the graph that it exports to cost the same, by two walkers that share no rule."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torchvision
import transformers
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from torch import nn

from narrowcast.accounting.profile import Profile, profile, profile_module
from narrowcast.accounting.sources import source
from narrowcast.models.loaders import load_model, load_module
from narrowcast.models.reference import ModelRef

Build = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
TINY: dict[str, Any] = {"vocab_size": 99, "max_position_embeddings": 32}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def both(build: Build, folder: Path, *, optimize: bool) -> tuple[Profile, Profile, nn.Module]:
    """Return the profiles of an exported graph and of its module, and the module."""
    torch.manual_seed(0)
    module, inputs = build()
    with torch.no_grad():
        for tensor in module.eval().parameters():
            tensor.normal_(std=0.1)  # the exporter drops biases that are zero
    program = torch.onnx.export(module, inputs, dynamo=True, verbose=False, optimize=optimize)
    assert program is not None
    program.save(str(folder / "model.onnx"))
    return profile(source(str(folder / "model.onnx"))), profile_module(module, inputs), module


def the_same(graph: Profile, module: Profile) -> None:
    assert not graph.uncounted
    assert graph.macs == module.macs > 0
    assert graph.parameters.total == graph.parameters.trainable == module.parameters.total
    assert graph.parameters.bytes == module.parameters.bytes
    assert graph.bias_adds == module.bias_adds
    assert graph.additions == module.additions
    parts = {part.path: part for part in graph.parts}
    for part in module.parts:
        if part.macs:
            assert parts[part.path].macs == part.macs
            # Containers that only hold a list run nothing themselves: a graph knows their place, and not their class.
            assert parts[part.path].kind in (part.kind, "" if part.kind == "ModuleList" else part.kind)


def small_network() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    layers = [
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    ]
    return nn.Sequential(*layers), (torch.zeros(2, 3, 17, 17),)


class Recurrent(nn.Module):
    """One bidirectional LSTM of two layers and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(12, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.second = nn.GRU(16, 6, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)[0])[0]


def encoder() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.zeros(2, 7, 32),)


def gpt2(written: str = "sdpa") -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    config._attn_implementation = written
    return transformers.GPT2LMHeadModel(config), (torch.ones(2, 9, dtype=torch.int64),)


def bert() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **TINY
    )
    return transformers.BertModel(config), (torch.ones(2, 9, dtype=torch.int64),)


def vision(name: str) -> Build:
    return lambda: (torchvision.models.get_model(name, weights=None), (torch.zeros(1, 3, 224, 224),))


SMALL: dict[str, Build] = {
    "network": small_network,
    "recurrent": lambda: (Recurrent(), (torch.zeros(3, 5, 12),)),
    "encoder": encoder,
}
LARGE: dict[str, Build] = {
    "bert": bert,
    "gpt2": gpt2,
    **{
        name: vision(name)
        for name in (
            "resnet18",
            "mobilenet_v3_small",
            "efficientnet_b0",
            "vit_b_16",
            "convnext_tiny",
            "swin_t",
            "densenet121",
        )
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_a_graph_as_it_is_exported_costs_what_its_module_costs(name: str, tmp_path: Path) -> None:
    graph, module, _ = both(SMALL[name], tmp_path, optimize=False)
    the_same(graph, module)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("written", ["eager", pytest.param("sdpa", marks=pytest.mark.exhaustive)])
def test_masks_of_a_graph_hide_what_those_of_its_module_hide(written: str, optimize: bool, tmp_path: Path) -> None:
    graph, module, _ = both(lambda: gpt2(written), tmp_path, optimize=optimize)
    assert graph.attention == module.attention
    assert module.attention.masked == module.attention.calls == 2
    assert module.attention.unknown == 0


def test_folding_a_batch_norm_trades_its_parameters_for_biases(tmp_path: Path) -> None:
    graph, module, built = both(small_network, tmp_path, optimize=True)
    norm = built[1]  # type: ignore[index]
    width = norm.num_features
    positions = 2 * 8 * 8
    assert graph.macs == module.macs
    assert graph.parameters.total == module.parameters.total - 2 * width + width
    assert graph.bias_adds == module.bias_adds + width * positions
    convolution = next(operator for operator in graph.operators if operator.name == "Conv")
    assert convolution.path == "0"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LARGE)
def test_networks_cost_what_their_modules_cost(name: str, tmp_path: Path) -> None:
    graph, module, _ = both(LARGE[name], tmp_path, optimize=False)
    the_same(graph, module)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_optimised_exports_have_as_many_macs(name: str, tmp_path: Path) -> None:
    graph, module, built = both((SMALL | LARGE)[name], tmp_path, optimize=True)
    assert not graph.uncounted
    assert graph.macs == module.macs
    norms = [part for part in built.modules() if isinstance(part, nn.BatchNorm2d)]
    if not norms:
        assert graph.bias_adds == module.bias_adds
        return
    # Every convolution that took a norm in has a bias of as many numbers as the norm had shifts; its scale is gone.
    folded = sum(part.num_features for part in norms) - graph.parameters.by_kind.get("BatchNormalization", 0) // 2
    assert graph.parameters.total == module.parameters.total - folded


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["efficientnet-lite0", "minilm"])
def test_bundled_models_cost_what_their_graphs_cost(name: str, tmp_path: Path) -> None:
    reference = ModelRef("bundled", name)
    (tmp_path / "model.onnx").write_bytes(load_model(reference).exported)
    tokens = 64 if name == "minilm" else None
    graph = profile(source(str(tmp_path / "model.onnx"), batch=2, tokens=tokens))
    made = load_module(reference)
    assert made is not None
    module = profile_module(made.module, made.examples)
    assert not graph.uncounted
    assert graph.macs == module.macs
    norms = [part for part in made.module.modules() if isinstance(part, nn.BatchNorm2d)]
    if norms:
        folded = sum(part.num_features for part in norms) - graph.parameters.by_kind.get("BatchNormalization", 0) // 2
        assert graph.parameters.total == module.parameters.total - folded


class Samples(CalibrationDataReader):
    """One sample for calibration."""

    def __init__(self) -> None:
        self._left = [{"src": np.random.default_rng(0).normal(size=(2, 7, 32)).astype(np.float32)}]

    def get_next(self) -> dict[str, Any] | None:
        return self._left.pop() if self._left else None


@pytest.mark.exhaustive
def test_quantised_and_fused_graphs_have_the_work_and_the_parameters_of_the_module(tmp_path: Path) -> None:
    plain, module, _ = both(encoder, tmp_path, optimize=True)
    given, made = tmp_path / "model.onnx", tmp_path / "made.onnx"
    assert plain.parameters.total == module.parameters.total

    def fuse() -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(made)
        ort.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])

    for make in (
        fuse,
        lambda: quantize_dynamic(given, made),
        lambda: quantize_static(given, made, Samples(), quant_format=QuantFormat.QDQ),
    ):
        make()
        found = profile(source(str(made)))
        assert not found.uncounted
        assert found.macs == module.macs
        assert found.parameters.total == module.parameters.total
        assert (found.bias_adds, found.additions) == (module.bias_adds, module.additions)
    quantize_static(given, made, Samples(), quant_format=QuantFormat.QOperator)
    assert profile(source(str(made))).macs == module.macs
