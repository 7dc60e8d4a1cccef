"""The optimizer, and the learning rate of each step as a pure function of the step."""

import math

import torch

from mmbeam.training.options import Schedule, TrainOptions

BETAS = (0.9, 0.98)  # of Adam; the second as in Vaswani et al. 2017: quick to follow a short training
MOMENTUM = 0.9  # of SGD


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are to learn; biases, norms and other vectors do not decay."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=MOMENTUM)
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=options.learning_rate, betas=BETAS)


def warmup_steps(options: TrainOptions, total: int) -> int:
    """How many steps the learning rate rises."""
    return options.warmup_steps if options.warmup_steps is not None else math.ceil(total / 20)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """What part of the highest learning rate step `step` (from 0) of `total` has.

    It rises linearly over `warmup` steps, then falls to 0 along half a cosine or a line, or stays.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
