"""Loss, optimizer, learning rate and freezing: everything that changes with the step is a function of the step."""

import math

import torch
from torch import Tensor, nn

from vrt.params import Optimizer


def charbonnier(restored: Tensor, truth: Tensor, eps: float) -> Tensor:
    """Mean of sqrt(d^2 + eps) over all elements, the loss VRT is trained with (Liang et al. 2022, section 3.5).

    `restored` and `truth`: equal shapes, [0, 1]. Returns a scalar.
    """
    return torch.sqrt((restored - truth) ** 2 + eps).mean()


def learning_rate(step: int, lr: float, lr_min: float, period: int) -> float:
    """Half a cosine from `lr` (step 0) to `lr_min` (step `period`), held there ever after."""
    return lr_min + (lr - lr_min) * (1 + math.cos(math.pi * min(step, period) / period)) / 2


def split_parameters(network: nn.Module, flow_names: tuple[str, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(all other parameters, those whose name contains one of `flow_names`), each in the network's order.

    Raises ValueError where a name matches no parameter: it would be a schedule for nothing.
    """
    named = list(network.named_parameters())
    for pattern in flow_names:
        if not any(pattern in name for name, _ in named):
            parts = ", ".join(sorted({name.split(".")[0] for name, _ in named}))
            raise ValueError(f"optimizer.flow_names: {pattern!r} matches no parameter of the network; its parts are {parts}: correct or remove it")
    is_flow = [any(pattern in name for pattern in flow_names) for name, _ in named]
    others = [parameter for (_, parameter), flow in zip(named, is_flow) if not flow]
    return others, [parameter for (_, parameter), flow in zip(named, is_flow) if flow]


def make_optimizer(network: nn.Module, settings: Optimizer) -> torch.optim.Adam:
    """Adam in KAIR's groups: first all other parameters, then (where there are any) flow and deformable alignment."""
    groups = [parameters for parameters in split_parameters(network, settings.flow_names) if parameters]
    rates = (settings.lr, settings.lr * settings.flow_lr_scale)
    # KAIR's scheduler reads `initial_lr` from a loaded optimizer.
    options = [{"params": group, "lr": rate, "initial_lr": rate} for group, rate in zip(groups, rates)]
    return torch.optim.Adam(options, betas=settings.betas, weight_decay=0)


def set_schedule(optimizer: torch.optim.Adam, settings: Optimizer, step: int) -> float:
    """Set learning rates and freezing for `step` (the first is 1). Returns the learning rate of the first group."""
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = learning_rate(step, group["initial_lr"], settings.lr_min, settings.lr_period)
        for parameter in group["params"]:
            # Without a gradient Adam leaves a parameter and its state alone.
            parameter.requires_grad_(index == 0 or step > settings.flow_frozen_steps)
    return optimizer.param_groups[0]["lr"]
