"""Small models for the doctor: healthy ones, and one for each planted fault."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.training import Trainer, precision
from narrowcast.training.doctor.watch import Watch


def squares(outputs, targets):
    return (outputs.float() - targets).square().mean()


def watched(model, loss, *, policy="fp32", optimizer=None, level="cheap", every=50, folder=None, rank=0, **settings):
    """Return a trainer with a doctor beside it."""
    policy = precision(policy) if isinstance(policy, str) else policy
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-3)
    doctor = Watch(
        model, level, every=every, optimizer=optimizer, loss=loss, precision=policy, folder=folder, rank=rank
    )
    return Trainer(model, optimizer, loss, precision=policy, watch=doctor, **settings), doctor


class Stretched(nn.Module):
    """Three linear layers; the second one's input is made so large that FP16 cannot hold its result."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.third = nn.Linear(8, 2)
        self.factor = factor

    def forward(self, x):
        return self.third(self.norm(self.second(torch.relu(self.first(x)) * self.factor)))


class Attention(nn.Module):
    """Attention whose softmax is written by hand, without the maximum subtracted."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).transpose(-1, -2)).exp()
        return (weights / weights.sum(-1, keepdim=True)) @ self.value(x)


class HalfNorm(nn.Module):
    """A layer norm in FP16 whose epsilon FP16 rounds to zero."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x.half()
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-8) * self.weight


class Logarithm(nn.Module):
    def forward(self, x):
        return torch.log(x.relu())


class DelayedLinear(nn.Linear):
    """A linear layer whose inputs are cast to FP8 with the largest magnitude of long ago."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_buffer("largest", torch.tensor(1.0))

    def forward(self, x):
        scale = 448.0 / self.largest
        cast = (x * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(x.dtype) / scale
        return F.linear(x + (cast - x).detach(), self.weight, self.bias)


class SmallConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class SmallTransformer(nn.Module):
    def __init__(self, vocabulary: int = 32, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.blocks(self.embedding(tokens), mask=mask, is_causal=True))


class SmallRecurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class LargeEmbedding(nn.Module):
    """An embedding of which a batch meets a few rows; the others have a gradient of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5000, 16, padding_idx=0)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(5 * 16, 4)

    def forward(self, tokens):
        return self.head(self.drop(self.embedding(tokens).flatten(1)))


class SomeExperts(nn.Module):
    """Four experts of which the last is never asked, so that it has no gradient but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.route, self.head = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        shares = self.route(x).softmax(-1) * torch.tensor([1.0, 1.0, 1.0, 0.0])
        return self.head(sum(expert(x) * shares[:, place, None] for place, expert in enumerate(self.experts)))


def tokens_loss(outputs, targets):
    return F.cross_entropy(outputs.float().flatten(0, 1), targets.flatten())


def healthy(name: str):
    """Return a model, its loss and a batch."""
    if name == "cnn":
        return SmallConvolutions(), F.cross_entropy, (torch.randn(16, 1, 8, 8), torch.randint(0, 4, (16,)))
    if name == "transformer":
        tokens = torch.randint(0, 32, (4, 13))
        return SmallTransformer(), tokens_loss, (tokens[:, :-1], tokens[:, 1:])
    if name == "embedding":
        return LargeEmbedding(), F.cross_entropy, (torch.randint(0, 50, (8, 5)), torch.randint(0, 4, (8,)))
    if name == "experts":
        return SomeExperts(), F.cross_entropy, (torch.randn(16, 8), torch.randint(0, 4, (16,)))
    return SmallRecurrent(), F.cross_entropy, (torch.randn(16, 10, 8), torch.randint(0, 4, (16,)))
