"""How kernels find codes of codebooks: a parabola guesses, one edge decides, exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from narrowcast import formats as nf
from narrowcast.formats import fast, triton_specs
from narrowcast.formats.table import ELEMENTS


@pytest.mark.parametrize(
    "format",
    [
        *(ELEMENTS[name] for name in ("nf4", "nf3", "nf2")),
        nf.Codebook("own", (-1.0, -0.6, -0.3, -0.1, 0.14, 0.34, 0.63, 1.0)),
    ],
    ids=lambda format: format.name,
)
def test_a_codebooks_code_is_guessed_and_decided_by_one_edge(format):
    guess, words = triton_specs.Guess.of(format), triton_specs.edge_words(format).view(np.float32).reshape(16, 2)
    edges = fast.codebook_edges(format, "float32").astype(np.float32)
    rng = np.random.default_rng(0)
    scales = rng.uniform(1, 2, (500, 1)).astype(np.float32)
    near = (edges[rng.integers(0, len(edges), (500, 16))] * scales).view(np.int32) + rng.integers(-2, 3, (500, 16))
    x = np.concatenate(
        [near.astype(np.int32).view(np.float32), (rng.uniform(-1, 1, (500, 16)) * scales).astype(np.float32)], 1
    )
    wanted = np.searchsorted(edges, x / scales)
    guessed = np.floor(guess(x.astype(np.float64) / scales)).astype(int)
    assert ((guessed == wanted) | (guessed == wanted - 1)).all()
    for number, scale, code, guessed_code in zip(
        x.flat, np.repeat(scales, x.shape[1]), wanted.flat, guessed.flat, strict=True
    ):
        edge, half = (Fraction(float(word)) / 2**100 if np.isfinite(word) else None for word in words[guessed_code])
        above = edge is not None and Fraction(float(number)) > Fraction(float(scale)) * (edge + half)
        assert guessed_code + above == code


def test_a_codebook_far_from_any_parabola_is_not_guessed():
    steep = nf.Codebook("steep", tuple(sorted([*(0.001 * i for i in range(8)), *(1 - 0.001 * i for i in range(8))])))
    assert triton_specs.Guess.of(steep) is None
