"""The loops that the training benchmarks compare: by hand, and through the trainer, with a doctor and without."""

import torch
from torch import nn

from narrowcast.training.fused import FusedAdamW
from narrowcast.training.loss_scale import DynamicScale
from narrowcast.training.policies import precision as policy_of
from narrowcast.training.trainer import Trainer

#: A first update that a loop by hand left out would make NaN of PyTorch's fused momentum.
FIRST_SCALE = 2.0**10
CAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16, "fp8-mixed": torch.bfloat16}


def optimizer_of(workload, parameters, name):
    if workload.unit == "images":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-5, fused=True)
    make = {
        "torch": lambda: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "fused": lambda: FusedAdamW(parameters, 1e-4),
    }
    return make[name]()


class Plain:
    """What a person writes with PyTorch's parts alone."""

    def __init__(self, model, optimizer, precision, device, clip_norm):
        if precision == "fp8-mixed":
            convert_to_float8(model)
        self.model, self.optimizer, self.device, self.clip_norm = model, optimizer, device, clip_norm
        self.cast = CAST.get(precision)
        self.scaler = torch.amp.GradScaler(device, init_scale=FIRST_SCALE, enabled=precision == "fp16-mixed")

    def step(self, batch):
        with torch.autocast(self.device, dtype=self.cast, enabled=self.cast is not None):
            loss = self.model(*batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def convert_to_float8(model):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    linear = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("tensorwise"),
        module_filter_fn=lambda _part, name: name not in (linear[0], linear[-1]),
    )


class Ours:
    """The same through the trainer, with nothing that watches."""

    watch = None

    def __init__(self, model, optimizer, precision, device, clip_norm):
        self.model, self.optimizer = model, optimizer
        policy = policy_of(precision)
        if policy.scale.guards:
            policy = policy_of(policy, loss_scale=DynamicScale(initial=FIRST_SCALE))
        self.trainer = Trainer(model, optimizer, loss_itself, precision=policy, clip_norm=clip_norm, watch=self.watch)

    def step(self, batch):
        return self.trainer.step((batch, batch[1])).mean_loss


class Watched(Ours):
    """The same as the trainer is by itself, with the doctor at its cheap level."""

    watch = "cheap"


def loss_itself(value, _targets):
    return value
