"""Networks to be trained, and run folders as models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowcast.errors import ModelError
from narrowcast.models.loaders import load_module
from narrowcast.models.reference import ModelRef
from narrowcast.training.config import Network
from narrowcast.training.networks import inputs_of, parameters_of, trainable, trained
from narrowcast.training.outcome import write_weights

MODULE = """
import torch
def net(width=3):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width)), torch.zeros(2, 1, 8, 8)
def frozen():
    return torch.nn.Flatten(), torch.zeros(2, 4)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{abs(hash(tmp_path.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def run_folder(folder: Path, module: torch.nn.Module, **record: Any) -> Path:
    folder.mkdir()
    sha256 = write_weights(folder, module.state_dict())
    known = {"model": "bundled:digits-cnn", "arguments": {}, "input": None, "sha256": sha256}
    (folder / "result.json").write_text(json.dumps(known | record))
    return folder


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        (Network(name="bundled:digits-cnn"), 63_346),
        (Network(name="bundled:mnist-cnn"), 63_346),
        (Network(name="bundled:mnist-cnn-small"), 4_180),
        (Network(name="bundled:mnist-cnn", arguments={"width": 8}), 7_298),
        (Network(name="timm:resnet10t", arguments={"num_classes": 10, "in_chans": 1}, input=(1, 28, 28)), 4_927_186),
        (Network(name="torchvision:squeezenet1_1", arguments={"num_classes": 10}, input=(3, 64, 64)), 727_626),
    ],
    ids=lambda value: value.name if isinstance(value, Network) else "",
)
def test_a_network_is_built_with_its_arguments(settings: Network, parameters: int) -> None:
    made, architecture = trainable(settings, seed=0)
    assert parameters_of(made.module) == parameters
    assert architecture.name == settings.name
    with torch.no_grad():
        assert made.module.eval()(*made.examples).shape == (2, 10)
    if settings.input is not None:
        assert made.examples[0].shape[1:] == settings.input
        assert made.image is not None
        assert (made.image.size, len(made.image.mean)) == (settings.input[1:], settings.input[0])


def test_the_seed_makes_the_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        return list(trainable(Network(name="bundled:digits-cnn"), seed=seed)[0].module.parameters())

    assert all(map(torch.equal, weights(1), weights(1)))
    assert not all(map(torch.equal, weights(1), weights(2)))


def test_the_bundled_network_has_trained_weights_as_a_model_and_fresh_ones_to_train() -> None:
    shipped = load_module(ModelRef.parse("bundled:digits-cnn"))
    fresh, _ = trainable(Network(name="bundled:digits-cnn"), seed=0)
    assert shipped is not None
    assert not shipped.random_weights
    assert fresh.random_weights
    assert not torch.equal(shipped.module[0].weight, fresh.module[0].weight)


def test_data_loaders_see_the_inputs() -> None:
    made, architecture = trainable(Network(name="bundled:mnist-cnn"), seed=0)
    (info,) = inputs_of(made, architecture.name).graph.inputs
    assert (info.name, str(info.dtype), info.shape, info.dynamic_batch) == ("image", "float32", (None, 1, 28, 28), True)


def test_a_function_takes_arguments(own: str) -> None:
    made, _ = trainable(Network(name=f"py:{own}:net", arguments={"width": 5}), seed=0)
    assert parameters_of(made.module) == 64 * 5 + 5


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (Network(name="onnx:net.onnx"), "cannot be trained"),
        (Network(name="bundled:mnist_cnn"), "no bundled model"),
        (Network(name="bundled:mnist-cnn", arguments={"depth": 3}), "cannot be built with {'depth': 3}"),
        (Network(name="bundled:minilm", arguments={"depth": 3}), "takes no arguments"),
        (Network(name="bundled:mnist-cnn", input=(1, 8, 8)), "says itself what it takes"),
        (Network(name="timm:resnet10t", arguments={"classes": 3}), "cannot be built"),
    ],
    ids=lambda value: value.name if isinstance(value, Network) else "",
)
def test_a_network_that_cannot_be_built_is_named(settings: Network, what: str) -> None:
    with pytest.raises(ModelError) as caught:
        trainable(settings, seed=0)
    assert what in caught.value.what


def test_a_network_without_parameters_is_refused(own: str) -> None:
    with pytest.raises(ModelError, match="no parameters"):
        trainable(Network(name=f"py:{own}:frozen"), seed=0)


# Run folders ----------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_a_model_with_trained_weights(tmp_path: Path) -> None:
    made, _ = trainable(Network(name="bundled:digits-cnn"), seed=5)
    folder = run_folder(tmp_path / "run", made.module)
    ref = ModelRef.parse(str(folder))
    assert ref == ModelRef("run", str(folder))
    found = load_module(ref)
    assert found is not None
    assert not found.random_weights
    assert all(map(torch.equal, found.module.state_dict().values(), made.module.state_dict().values()))
    again, architecture = trainable(Network(name=str(folder)), seed=0)
    assert architecture.name == "bundled:digits-cnn"
    assert torch.equal(again.module[0].weight, made.module[0].weight)
    assert torch.equal(trained(str(folder))[0].weight, made.module[0].weight)


def test_bf16_weights_are_read_as_fp32(tmp_path: Path) -> None:
    made, _ = trainable(Network(name="bundled:digits-cnn"), seed=5)
    narrow = made.module.to(torch.bfloat16)
    found = load_module(ModelRef.parse(str(run_folder(tmp_path / "run", narrow))))
    assert found is not None
    weight = found.module[0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, narrow[0].weight.float())


def test_other_weights_than_those_recorded_are_refused(tmp_path: Path) -> None:
    made, _ = trainable(Network(name="bundled:digits-cnn"), seed=5)
    folder = run_folder(tmp_path / "run", made.module)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        load_module(ModelRef.parse(str(folder)))
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        load_module(ModelRef.parse(str(folder)))


def test_weights_of_another_network_are_named_by_their_keys(tmp_path: Path) -> None:
    made, _ = trainable(Network(name="bundled:digits-cnn"), seed=5)
    narrow = run_folder(tmp_path / "narrow", made.module, arguments={"width": 8})
    with pytest.raises(ModelError, match=r"0\.weight is \[24, 1, 3, 3\], in the network \[8, 1, 3, 3\]"):
        load_module(ModelRef.parse(str(narrow)))
    other = run_folder(tmp_path / "other", torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"without 0\.weight, .* with bias, weight"):
        load_module(ModelRef.parse(str(other)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "bundled:digits-cnn"}', '{"model": 1, "arguments": 3}'])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ModelError, match="cannot be read as the record"):
        load_module(ModelRef.parse(str(tmp_path)))


def test_nobody_learns_from_an_untrained_teacher() -> None:
    with pytest.raises(ModelError, match="nobody trained"):
        trained("bundled:mnist-cnn")
