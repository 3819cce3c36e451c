"""E, the exponential moving average of the weights: what is validated and released."""

import copy

import torch
from torch import nn


def copy_for_ema(network: nn.Module) -> nn.Module:
    """E before the first step: a copy of G that is never trained."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """E <- decay * E + (1 - decay) * G. Buffers are constants in this network and stay."""
    torch._foreach_lerp_(list(ema.parameters()), [parameter.detach() for parameter in network.parameters()], 1 - decay)
