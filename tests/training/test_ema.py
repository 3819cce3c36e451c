"""The averaged weights E."""

import pytest
import torch
from torch import nn

from vrt.training.ema import copy_for_ema, update_ema


def test_the_average_follows_its_recurrence():
    network = nn.Linear(1, 1).double()
    ema = copy_for_ema(network)
    expected = [parameter.item() for parameter in network.parameters()]
    for step in range(50):
        with torch.no_grad():
            for number, parameter in enumerate(network.parameters()):
                parameter.fill_((-1) ** step * (step + number))
        update_ema(ema, network, 0.9)
        expected = [0.9 * mean + 0.1 * parameter.item() for mean, parameter in zip(expected, network.parameters())]
    assert [parameter.item() for parameter in ema.parameters()] == pytest.approx(expected, rel=1e-12)


def test_the_average_is_apart_from_the_network_and_never_trained():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = copy_for_ema(network)
    before = ema[0].weight.clone()
    with torch.no_grad():
        network[0].weight += 1
    assert torch.equal(ema[0].weight, before)
    assert not ema.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert network.training
