"""Train a small network on the UCI digits and write what narrowcast reads: model.onnx, data.npz and batch.npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

TRAINING = 1000


def main() -> None:
    """Train, export, and write the samples that were not trained on."""
    torch.manual_seed(0)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)  # [N, 1, 8, 8], 0 to 1
    labels = digits.target[order].astype(np.int64)

    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    inputs, targets = torch.from_numpy(images[:TRAINING]), torch.from_numpy(labels[:TRAINING])
    for _ in range(12):
        for batch in torch.randperm(TRAINING).split(50):
            loss = nn.functional.cross_entropy(network(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    # The first axis is dynamic: narrowcast feeds batches of any size. The example has a batch of 2, because PyTorch's
    # exporter takes a batch of 1 for a constant.
    network.eval()
    program = torch.onnx.export(
        network, (inputs[:2],), input_names=["image"], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), dynamo=True
    )
    assert program is not None
    program.save("model.onnx")

    # One array per model input, by the input's name, and the class of each sample as "labels".
    np.savez("data.npz", image=images[TRAINING:], labels=labels[TRAINING:])
    np.savez("batch.npz", image=images[TRAINING : TRAINING + 4])
    print(*(f"{name}: {Path(name).stat().st_size} bytes" for name in ("model.onnx", "data.npz", "batch.npz")), sep="\n")


if __name__ == "__main__":
    main()
