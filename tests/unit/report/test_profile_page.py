"""The page about what a model costs, and the same on a terminal: sound, whole, and true to the numbers."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import Page, alone, chromium
from PIL import Image
from rich.console import Console
from torch import nn

from narrowcast.accounting.devices import device
from narrowcast.accounting.kv_cache import KVCache
from narrowcast.accounting.memory import memory_of_module
from narrowcast.accounting.policies import policy
from narrowcast.accounting.profile import profile_module
from narrowcast.accounting.roofline import estimate
from narrowcast.report import text
from narrowcast.report.profile import render_profile
from narrowcast.report.profile_costs import BATCHES, TOKENS, Costs, cache_rows, compared, differences, groups, rows
from narrowcast.report.profile_terminal import notes, render_comparison_terminal, render_profile_terminal
from narrowcast.report.profile_tree import Node

ODD = "<b>&\u202e\x1b[31m"


class Odd(nn.Module):
    """A module whose child has a name that must not become markup."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(ODD, nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.get_submodule(ODD)(x))


def network(width: int = 8) -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, width, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def costs(
    module: nn.Module, *inputs: torch.Tensor, on: str | None = "t4", train: bool = False, name: str = ""
) -> Costs:
    found = profile_module(module, inputs, train=train, name=name)
    where, how = None if on is None else device(on), policy("fp16" if on else "fp32")
    held = memory_of_module(module, inputs, mode="train" if train else "infer", policy="fp32", name=name)
    times = None if where is None else estimate(found.operators, where, how)
    return Costs(found, how, where, times, held, KVCache.uniform(2, heads=2, width=16) if on else None)


IMAGE = torch.zeros(2, 3, 16, 16)


@pytest.fixture(scope="module")
def ordinary() -> Costs:
    return costs(network(), IMAGE, name="a network")


@pytest.fixture(scope="module")
def bare() -> Costs:
    return costs(network(16), IMAGE, on=None, name="another")


@pytest.fixture(params=["ordinary", "bare", "odd", "trained", "two", "nothing"])
def several(request: pytest.FixtureRequest, ordinary: Costs, bare: Costs) -> list[Costs]:
    match request.param:
        case "ordinary":
            return [ordinary]
        case "bare":
            return [bare]
        case "odd":
            return [costs(Odd(), torch.zeros(2, 8), name=ODD)]
        case "trained":
            return [costs(network(), IMAGE, train=True, name="trained")]
        case "two":
            return [ordinary, bare]
        case _:
            return [costs(nn.Flatten(), torch.zeros(2, 8), name="nothing")]


def test_the_page_is_sound_and_needs_nothing_else(several: list[Costs]):
    source = render_profile(several)
    page = alone(source)
    assert not re.search(r"\bnan\b|\binf\b|None", re.sub(r"<style>.*?</style>", "", source, flags=re.DOTALL))
    identities = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    for attributes in page.all("section"):
        assert attributes["aria-labelledby"] in identities
    assert all(attributes.get("aria-label") for attributes in page.all("svg"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_names_cannot_become_markup():
    source = render_profile([costs(Odd(), torch.zeros(2, 8), name=ODD)])
    assert "<b>" not in source
    assert "\x1b" not in source
    assert "\u202e" not in source


def test_every_number_is_there_exactly(ordinary: Costs):
    page = Page(render_profile([ordinary]))
    for row in rows(ordinary):
        assert row.label in page.text
        assert re.sub(r"\s+", " ", row.short) in page.text
        assert row.exact in page.text
    assert ordinary.estimate is not None
    assert re.sub(r"\s+", " ", text.quantity(ordinary.estimate.seconds, "s")) in page.text


def test_numbers_of_the_rows_mean_one_thing(ordinary: Costs):
    values = {row.label: row.value for row in rows(ordinary)}
    found = ordinary.profile
    assert values["FLOPs"] == 2 * values["MACs"] == 2 * found.macs
    assert values["additions, biases included"] - values["additions, biases apart"] == values["bias additions"]
    assert values["multiplications"] == found.macs
    # The same in half precision: nothing but the bytes that floating tensors take is halved.
    assert values["bytes moved"] == pytest.approx(found.bytes_moved / 2, rel=0.02)
    assert ordinary.memory is not None
    assert values["peak memory"] == ordinary.memory.peak


def test_operators_are_all_in_one_group_each(ordinary: Costs):
    made = groups(ordinary)
    found = ordinary.profile
    assert sum(group.macs for group in made) == found.macs
    assert sum(group.flops for group in made) == 2 * found.macs + found.bias_adds + found.other_flops
    assert ordinary.estimate is not None
    assert sum(group.seconds or 0.0 for group in made) == pytest.approx(
        sum(time.seconds for time in ordinary.estimate.operators)
    )
    (conv,) = [group for group in made if group.count == 3 and group.name == "convolution"]
    assert conv.macs == 3 * 2 * 14 * 14 * 8 * 8 * 9
    assert [group.seconds for group in made] == sorted((group.seconds for group in made), key=lambda s: -(s or 0.0))


def test_the_tree_of_the_page_has_every_line(ordinary: Costs):
    page = Page(render_profile([ordinary]))
    body = page.text[page.text.index("Open a line to see") : page.text.index("Operators of equal sort")]

    def check(node: Node) -> None:
        assert node.label in body
        assert re.sub(r"\s+", " ", text.count(node.macs)) in body or not node.macs
        for child in node.children:
            check(child)

    check(ordinary.tree)
    assert "3 × Sequential" in body
    assert len(page.all("details")) >= 2


def test_operators_sort_by_any_column(ordinary: Costs):
    source = render_profile([ordinary])
    found = re.findall(r'<tr role="row" style="([^"]*)"', source)
    assert len(found) == len(groups(ordinary))
    for measure in ("macs", "bytes", "intensity", "time"):
        ranks = sorted(int(place) for style in found for place in re.findall(rf"--{measure}:(\d+)", style))
        assert ranks == list(range(len(found)))
        assert f"[value={measure}]:checked" in source
        assert f'value="{measure}"' in source
    assert source.count("checked>") == 1


def test_bars_are_as_long_as_their_share_of_the_longest(ordinary: Costs):
    source = render_profile([ordinary])
    table = source[source.index('class="bars three"') : source.index("</table>", source.index('class="bars three"'))]
    widths = [float(width) for width in re.findall(r'class="bar c-blue" style="width:([\d.]+)%"', table)]
    assert widths[0] == 100
    assert widths == sorted(widths, reverse=True)


def test_the_parts_of_memory_fill_the_bar(ordinary: Costs):
    source = render_profile([ordinary])
    start = source.index('aria-labelledby="m0-memory"')
    bar = source[start : source.index('<ul class="legend"', start)]
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', bar)]
    assert sum(widths) == pytest.approx(100, abs=0.05)
    assert ordinary.memory is not None
    assert len(widths) == sum(bool(size) for size in ordinary.memory.parts.values())


def test_what_nobody_asked_for_is_not_shown(bare: Costs):
    page = Page(render_profile([bare]))
    for words in ("Time on the device", "Roofline", "Keys and values of past"):
        assert words not in page.text
    assert "Not counted Nothing: every operator" in page.text


def test_what_was_not_counted_is_named(bare: Costs):
    missing = bare.profile.model_copy(update={"uncounted": {"mystery": 3}})
    shown = Costs(missing, bare.policy)
    assert "mystery 3 ×" in Page(render_profile([shown])).text
    assert "mystery (3)" in printed(shown, 100)


def test_the_cache_is_given_by_tokens_and_sequences(ordinary: Costs):
    made = cache_rows(ordinary)
    assert [row.tokens for row in made] == list(TOKENS)
    per_token = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, width, bytes
    assert made[0].bytes == tuple(batch * TOKENS[0] * per_token for batch in BATCHES)
    assert ordinary.device is not None
    assert ordinary.memory is not None
    room = (ordinary.device.memory.bytes or 0) - ordinary.memory.weights - ordinary.memory.workspace
    assert made[0].fit == room // (TOKENS[0] * per_token)
    assert re.sub(r"\s+", " ", text.quantity(made[1].bytes[2], "bytes")) in Page(render_profile([ordinary])).text


def test_two_models_stand_side_by_side(ordinary: Costs, bare: Costs):
    page = Page(render_profile([ordinary, bare]))
    body = page.text[page.text.index("Side by side") : page.text.index("Every number, exactly")]
    for row in compared(ordinary, bare):
        for words in row:
            assert re.sub(r"\s+", " ", words) in body
    made = differences(ordinary, bare)
    assert made["MACs"]["difference"] == bare.profile.macs - ordinary.profile.macs
    assert made["MACs"]["ratio"] == bare.profile.macs / ordinary.profile.macs
    assert "time" not in made  # only one has it
    assert {"m0-tree", "m1-tree"} <= {attributes.get("id") for _, attributes in page.tags}


def printed(found: Costs, width: int, *, plain: bool = False, operators: int = 4) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if plain else "utf-8")
    render_profile_terminal(found, Console(file=stream, width=width, highlight=False), operators=operators)
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_terminal_keeps_numbers_whole(several: list[Costs], width: int):
    found = several[0]
    shown = printed(found, width)
    assert max(map(len, shown.splitlines())) <= width
    for words in (text.count(found.profile.macs), text.quantity(round(found.tree.bytes_moved), "bytes")):
        assert words in shown
    assert "\x1b" not in shown


def test_the_terminal_folds_equal_siblings(ordinary: Costs):
    lines = printed(ordinary, 120).splitlines()
    (folded,) = [line for line in lines if "3 × Sequential" in line]
    assert folded.strip().startswith("├ 1-3")
    assert text.count(ordinary.tree.children[1].macs) in folded


def test_a_terminal_without_unicode_gets_ascii(ordinary: Costs):
    assert printed(ordinary, 100, plain=True).isascii()


def test_masks_that_are_not_known_are_said():
    class Padded(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    padded = costs(Padded(), torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 4))
    assert any(note.startswith("1 of 1 attentions have masks that are not known") for note in notes(padded))
    plain = costs(network(), torch.zeros(1, 3, 8, 8))
    assert not any("masks" in note for note in notes(plain))
    assert any(note.startswith("Times are of eager PyTorch") for note in notes(plain))


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_fits_the_terminal(ordinary: Costs, bare: Costs, width: int):
    stream = io.StringIO()
    render_comparison_terminal(ordinary, bare, Console(file=stream, width=width, highlight=False))
    assert "…" not in stream.getvalue()
    assert ("first: " in stream.getvalue()) is (width == 80)
    for row in compared(ordinary, bare):
        (line,) = [line for line in stream.getvalue().splitlines() if line.strip().startswith(f"{row.label}  ")]
        assert row.difference in line
        assert row.ratio in line


@pytest.mark.slow
def test_a_browser_shows_the_page(ordinary: Costs, tmp_path: Path):
    page = tmp_path / "report.html"
    page.write_text(render_profile([ordinary]), encoding="utf-8")
    seen = tmp_path / "seen.png"
    chromium(tmp_path, page, f"--screenshot={seen}", "--window-size=1200,4000")
    with Image.open(seen) as image:
        pixels = np.asarray(image.convert("L"), np.float64)
    assert pixels.shape == (4000, 1200)
    assert min(band.std() for band in np.array_split(pixels, 4)) > 5
