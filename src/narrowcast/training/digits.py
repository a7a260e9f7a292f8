"""Train ``bundled:digits-cnn`` on the training half of the UCI digits: plain FP32, under a minute on two cores.

``python -m narrowcast.training.digits`` writes the weights that the package ships and prints the test accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from narrowcast.data.bundled import digits
from narrowcast.models.bundled import DIGITS_WEIGHTS, digits_cnn_module
from narrowcast.models.torch_export import require_torch

__all__ = ["train"]


def train(target: Path = DIGITS_WEIGHTS, *, epochs: int = 40, seed: int = 0) -> float:
    """Train the network, write its weights as safetensors, and return its accuracy on the test half.

    Args:
        target: File to write.
        epochs: Passes over the 898 training images, each image shifted by up to one pixel at random.
        seed: Seed of the initial weights, the order and the shifts.
    """
    torch = require_torch("training the digits network")
    import safetensors.torch

    torch.manual_seed(seed)
    model: Any = digits_cnn_module()
    images, labels = (torch.from_numpy(array) for array in digits("train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for batch in order[: len(images) // 64 * 64].split(64):
            shifts = torch.randint(-1, 2, (2,)).tolist()
            loss = torch.nn.functional.cross_entropy(
                model(torch.roll(images[batch], shifts, (2, 3))), labels[batch], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), target)
    test_images, test_labels = digits("test")
    with torch.no_grad():
        predicted = model(torch.from_numpy(test_images)).argmax(1).numpy()
    return float(np.mean(predicted == test_labels))


if __name__ == "__main__":
    print(f"accuracy on the test half: {train():.4f}")
