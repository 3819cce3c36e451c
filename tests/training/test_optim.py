"""Loss, learning rate and freezing: functions of the step, with the published values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vrt.training.loop import take_step
from vrt.training.optim import charbonnier, learning_rate, make_optimizer, set_schedule, split_parameters

# Measured on the published training (Adam at 4e-4, flow and alignment at an eighth, one cosine of 300,000 steps to 1e-7).
PUBLISHED = {
    1: (0.0003999999999890365, 4.999999999863196e-05),
    2: (0.00039999999995614605, 4.999999999452786e-05),
    1000: (0.0003999890366146342, 4.999863197566953e-05),
    19999: (0.00039563104809636524, 4.9454836959261375e-05),
    20000: (0.00039563061276672447, 4.9454782638308454e-05),
    20001: (0.0003956301774156359, 4.945472831467925e-05),
    150000: (0.00020005, 2.505e-05),
    299999: (1.0000001096348636e-07, 1.0000000136803693e-07),
}


@pytest.mark.parametrize("step", PUBLISHED)
def test_learning_rates_are_the_published_ones(step: int):
    rates = [learning_rate(step, lr, 1e-7, 300_000) for lr in (4e-4, 5e-5)]
    # The published training adds up its rates from step to step, which costs some digits.
    assert rates == pytest.approx(PUBLISHED[step], rel=1e-9)


def test_the_learning_rate_stays_at_its_minimum_after_the_cosine():
    # The published training starts over at the full rate there, for its last two steps.
    for step in (300_000, 300_001, 600_000, 900_001):
        assert learning_rate(step, 4e-4, 1e-7, 300_000) == pytest.approx(1e-7, rel=1e-12)


@given(st.integers(0, 2000), st.integers(1, 1000))
def test_the_learning_rate_never_rises_and_never_leaves_its_range(step: int, period: int):
    now, then = (learning_rate(s, 1e-3, 1e-6, period) for s in (step, step + 1))
    assert 1e-6 * (1 - 1e-12) <= then <= now <= 1e-3


def test_charbonnier_agrees_with_its_formula_in_double_precision():
    rng = np.random.default_rng(0)
    restored, truth = rng.random((2, 3, 3, 8, 8)), rng.random((2, 3, 3, 8, 8))
    restored[0] = truth[0] + 1e-5 * rng.standard_normal(truth[0].shape)  # where eps matters
    expected = np.mean(np.sqrt((restored - truth) ** 2 + 1e-9))
    found = charbonnier(torch.from_numpy(restored), torch.from_numpy(truth), 1e-9)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert charbonnier(torch.from_numpy(restored).float(), torch.from_numpy(truth).float(), 1e-9).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_charbonnier_is_finite_where_nothing_differs():
    restored = torch.zeros(4, requires_grad=True)
    charbonnier(restored, torch.zeros(4), 1e-9).backward()
    assert restored.grad.tolist() == [0, 0, 0, 0]


def small() -> nn.Module:
    network = nn.Module()
    network.body, network.spynet, network.stage1 = nn.Linear(2, 2), nn.Linear(2, 2), nn.Module()
    network.stage1.deform = nn.Linear(2, 2)
    network.norm = nn.LayerNorm(2)
    return network


def test_flow_and_alignment_are_told_from_the_rest_in_the_networks_order():
    network = small()
    others, flow = split_parameters(network, ("spynet", "deform"))
    assert [id(one) for one in others] == [id(one) for part in (network.body, network.norm) for one in part.parameters()]
    assert [id(one) for one in flow] == [id(one) for part in (network.spynet, network.stage1.deform) for one in part.parameters()]


def test_a_name_that_matches_no_parameter_is_an_error_that_names_the_parts():
    told = "optimizer.flow_names: 'spinet' matches no parameter of the network; its parts are body, norm, spynet, stage1: correct or remove it"
    with pytest.raises(ValueError, match=told):
        split_parameters(small(), ("deform", "spinet"))


def test_both_groups_follow_their_own_cosine(params):
    optimizer = make_optimizer(small(), params.optimizer.model_copy(update={"flow_names": ("spynet", "deform")}))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1e-3 * 0.125]
    assert set_schedule(optimizer, params.optimizer, 3) == pytest.approx((1e-3 + 1e-7) / 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([(1e-3 + 1e-7) / 2, (1.25e-4 + 1e-7) / 2])


def test_frozen_parameters_and_their_state_stay_until_their_step(params, fresh, batch_of):
    state = fresh()
    start = {name: value.clone() for name, value in state.network.state_dict().items()}
    for step in (1, 2):
        take_step(params, state, step, batch_of(step))
        for name, value in state.network.named_parameters():
            assert torch.equal(value, start[name]) == name.startswith("flow"), (step, name)
        assert not any(parameter in state.optimizer.state for parameter in state.network.flow.parameters())
    take_step(params, state, 3, batch_of(3))
    for name, value in state.network.named_parameters():
        assert not torch.equal(value, start[name]), name
    # Adam corrects its start by the number of a parameter's own steps: those that it was frozen for don't count.
    steps = {name: state.optimizer.state[value]["step"].item() for name, value in state.network.named_parameters()}
    assert {name: count for name, count in steps.items() if name.startswith("flow")} == {"flow.weight": 1, "flow.bias": 1}
    assert steps["body.0.weight"] == 3


def test_a_step_is_a_function_of_state_number_and_batch_alone(params, fresh, batch_of):
    ends = []
    for noise in (1, 2):
        state = fresh()
        torch.manual_seed(noise)
        take_step(params, state, 1, batch_of(1))
        ends.append(state.network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    state = fresh()
    take_step(params, state, 2, batch_of(1))
    assert not torch.equal(ends[0]["body.0.weight"], state.network.state_dict()["body.0.weight"]), "dropout draws anew at each step"
