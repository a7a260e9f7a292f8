"""``py:`` models whose example is a dictionary: inputs go to the arguments that they are named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowcast.errors import ModelError
from narrowcast.models.loaders import load_module
from narrowcast.models.reference import ModelRef

CODE = """
import torch
from torch import nn


class Difference(nn.Module):
    def forward(self, q, p, r=None):
        return q - p


def swapped():
    return Difference(), {"p": torch.ones(2, 3), "q": torch.full((2, 3), 5.0)}


def gap():
    return Difference(), {"q": torch.ones(2, 3), "r": torch.ones(2, 3)}


def others():
    return Difference(), {"left": torch.full((2, 3), 5.0), "right": torch.ones(2, 3)}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"named_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(("function", "names"), [("swapped", ["q", "p"]), ("others", ["left", "right"])])
def test_inputs_reach_the_arguments_of_their_names(module: str, function: str, names: list[str]) -> None:
    found = load_module(ModelRef("py", f"{module}:{function}"))
    assert found is not None
    assert found.names == names
    assert found.module(*found.examples).eq(4).all()


def test_an_argument_that_is_left_out_is_named(module: str) -> None:
    with pytest.raises(ModelError, match="leaves out 'p'"):
        load_module(ModelRef("py", f"{module}:gap"))
