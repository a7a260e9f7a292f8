"""Networks for the training benchmarks, written out: a GPT that returns its loss, and a ResNet-50."""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x):
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, S, D]
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2's architecture with its initialisation; the head shares the embedding's weights."""

    def __init__(self, layers, hidden, heads, length, vocabulary):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Embedding(length, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(
                    parameter, std=0.02 / (2 * layers) ** 0.5 if "out." in name or "narrow" in name else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.head.weight = self.tokens.weight

    def forward(self, tokens, targets):
        """Return the mean cross entropy; both shaped [batch, length], int64."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = 4 * width

        def layer(before, after, kernel, step=1):
            return nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(after)

        self.body = nn.Sequential(
            *layer(inputs, width, 1), nn.ReLU(), *layer(width, width, 3, stride), nn.ReLU(), *layer(width, outputs, 1)
        )
        self.short = (
            nn.Sequential(*layer(inputs, outputs, 1, stride)) if inputs != outputs or stride > 1 else nn.Identity()
        )

    def forward(self, x):
        return functional.relu(self.body(x) + self.short(x))


class ResNet(nn.Module):
    """ResNet-50 (v1.5: the stride lies in the 3x3 convolution) unless fewer blocks are asked for; it returns its loss."""

    def __init__(self, blocks=(3, 4, 6, 3), width=64, classes=1000):
        super().__init__()
        parts = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inputs = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                parts.append(Bottleneck(inputs, width << stage, 2 if stage and not number else 1))
                inputs = 4 * (width << stage)
        self.body = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(inputs, classes)

    def forward(self, images, targets):
        return functional.cross_entropy(self.head(self.body(images)), targets)


class Workload:
    """What is trained: a maker of the model and of batches on a device, and what a batch counts as.

    Args:
        unit: What is counted: tokens or images.
        build: Makes the model, in FP32, on the CPU.
        batch: Makes the model's arguments on a device.
        count: Units in a batch.
    """

    def __init__(self, unit, build, batch, count, about):
        self.unit, self.build, self.batch, self.count, self.about = unit, build, batch, count, about


def text_workload(layers, hidden, heads, length, vocabulary, batch):
    def make(device):
        tokens = torch.randint(0, vocabulary, (batch, length + 1), device=device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    about = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "length": length,
        "vocabulary": vocabulary,
        "batch": batch,
    }
    return Workload("tokens", lambda: GPT(layers, hidden, heads, length, vocabulary), make, batch * length, about)


def image_workload(batch, edge, **sizes):
    def make(device):
        images = torch.randn(batch, 3, edge, edge, device=device).to(memory_format=torch.channels_last)
        return images, torch.randint(0, sizes.get("classes", 1000), (batch,), device=device)

    def build():
        return ResNet(**sizes).to(memory_format=torch.channels_last)

    return Workload("images", build, make, batch, {"batch": batch, "edge": edge, "memory": "channels last", **sizes})


def workloads(tiny, batch=None):
    """Return the workloads by name; small ones if ``tiny``, to try the script on a CPU."""
    if tiny:
        return {
            "gpt": text_workload(2, 64, 4, 32, 256, batch or 2),
            "wide": text_workload(2, 64, 4, 32, 256, batch or 2),
            "resnet": image_workload(batch or 4, 32, blocks=(1, 1), width=8, classes=10),
        }
    return {
        "gpt": text_workload(24, 1024, 16, 1024, 50304, batch or 16),
        "wide": text_workload(4, 4096, 32, 2048, 32768, batch or 8),
        "resnet": image_workload(batch or 256, 224),
    }
