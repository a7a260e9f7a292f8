from __future__ import annotations

import sys
from pathlib import Path

import pytest

from narrowcast.errors import ModelError
from narrowcast.models.loaders import load_model
from narrowcast.models.reference import ModelRef


@pytest.mark.parametrize(
    ("text", "scheme", "name"),
    [
        ("timm:resnet18", "timm", "resnet18"),
        ("torchvision:resnet18", "torchvision", "resnet18"),
        ("py:my.module:build", "py", "my.module:build"),
        ("bundled:digits-cnn", "bundled", "digits-cnn"),
        ("onnx:nets/a.bin", "onnx", "nets/a.bin"),
        ("nets/a.onnx", "onnx", "nets/a.onnx"),
        ("C:/nets/a.onnx", "onnx", "C:/nets/a.onnx"),
        ("artifact:some/folder", "artifact", "some/folder"),
    ],
)
def test_a_reference_names_its_scheme_or_is_an_onnx_path(text: str, scheme: str, name: str) -> None:
    assert ModelRef.parse(text) == ModelRef(scheme, name)
    assert ModelRef.parse(str(ModelRef.parse(text))) == ModelRef(scheme, name)


def test_an_existing_folder_is_an_artifact(tmp_path: Path) -> None:
    assert ModelRef.parse(str(tmp_path)) == ModelRef("artifact", str(tmp_path))


@pytest.mark.parametrize("text", ["resnet18", "timm:", "tim:resnet18", "net.pt", "", ":", "model.onnx.gz"])
def test_a_text_that_is_no_reference_is_named_with_the_schemes(text: str) -> None:
    with pytest.raises(ModelError, match="names no known source") as caught:
        ModelRef.parse(text)
    assert repr(text) in caught.value.what
    assert "bundled" in caught.value.allowed


def test_a_misspelt_scheme_gets_a_suggestion() -> None:
    with pytest.raises(ModelError) as caught:
        ModelRef.parse("bundle:digits-cnn")
    assert "did you mean bundled?" in caught.value.allowed


def test_a_misspelt_bundled_model_gets_a_suggestion() -> None:
    with pytest.raises(ModelError, match="'digits_cnn'") as caught:
        load_model("bundled:digits_cnn")
    assert "did you mean digits-cnn?" in caught.value.allowed


def test_a_folder_without_a_graph_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model\.onnx"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("body", ["raise RuntimeError('no weights')", "raise OSError('no weights')"])
def test_what_goes_wrong_in_the_users_function_is_a_model_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    (tmp_path / "failing_net.py").write_text(f"def build(): {body}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "failing_net", raising=False)
    with pytest.raises(ModelError, match=r"py:failing_net:build failed with \w+Error: no weights"):
        load_model("py:failing_net:build")


@pytest.mark.parametrize("reference", ["py:module", "py:no_such_module:build"])
def test_a_function_that_does_not_exist_is_named(reference: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(reference)
    assert reference in caught.value.what
