"""The closed forms against numbers worked out by hand, those among them that are commonly written wrong."""

from __future__ import annotations

import pytest

from narrowcast.accounting import formulas


def test_the_small_cnn_that_is_often_miscounted() -> None:
    total = formulas.convolution(3, 16, (3, 3), (1, 1)) + formulas.linear(576, 120) + formulas.linear(120, 10)
    assert total.parameters == 448 + 69_240 + 1_210 == 70_898


def test_recurrent_layers_in_both_bias_conventions() -> None:
    assert formulas.recurrent("rnn", 128, 256, biases=1).parameters == 98_560
    assert formulas.recurrent("rnn", 128, 256).parameters == 98_816
    assert formulas.recurrent("lstm", 128, 256).parameters == 395_264
    assert formulas.recurrent("gru", 128, 256).parameters == 296_448


def test_attention_has_four_projections_and_a_feed_forward_block_two_biases() -> None:
    assert formulas.attention(512, 1, heads=8).parameters == 4 * 512 * 512 + 4 * 512
    assert formulas.feed_forward(512, 2048).parameters == 2 * 512 * 2048 + 2048 + 512


def test_additions_of_a_convolution() -> None:
    channels, kernel, outputs, size = 7, 3, 5, 4
    cost = formulas.convolution(channels, outputs, (kernel, kernel), (size, size))
    sums = outputs * size * size
    assert cost.additions(sums) == sums * channels * kernel**2  # with bias: as many as multiplications
    bare = formulas.convolution(channels, outputs, (kernel, kernel), (size, size), bias=False)
    assert bare.multiplications + bare.additions(sums) == sums * (2 * channels * kernel**2 - 1)


def test_causal_attention_sees_half_of_the_pairs() -> None:
    dense = formulas.attention(64, 10, heads=4).macs
    causal = formulas.attention(64, 10, heads=4, causal=True).macs
    assert dense - causal == 2 * 64 * (100 - 55)
    one_token = formulas.attention(64, 1, heads=4, keys=50, causal=True)
    assert one_token.macs == formulas.attention(64, 1, heads=4, keys=50).macs


def test_a_mixture_of_experts_has_more_parameters_than_a_token_meets() -> None:
    cost = formulas.mixture_of_experts(4096, 14_336, experts=8, chosen=2)
    expert = 3 * 4096 * 14_336
    assert cost.parameters == 8 * expert + 4096 * 8
    assert cost.active_parameters == 2 * expert + 4096 * 8
    assert cost.macs == cost.active_parameters


@pytest.mark.parametrize(
    ("size", "kernel", "options", "expected"),
    [
        (224, 7, {"stride": 2, "padding": 3}, 112),
        (10, 3, {"dilation": 2}, 6),
        (6, 4, {"stride": 2, "padding": 1, "transposed": True}, 12),
    ],
)
def test_output_sizes(size: int, kernel: int, options: dict[str, int], expected: int) -> None:
    assert formulas.convolution_output(size, kernel, **options) == expected  # type: ignore[arg-type]
