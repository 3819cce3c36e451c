"""Host copies: what is written is the state at the time of the save, in the same bytes whatever its history."""

import io
from collections.abc import Callable

import torch
from torch import nn

from vrt.checkpoint.snapshot import HostCopy


def saved(tree: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def trained(first: int, last: int, state: dict | None = None) -> dict:
    """The whole state of a small training after the steps `first` to `last`, continued from the bytes of `state`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam([{"params": network[1:].parameters(), "lr": 1e-3}, {"params": network[0].parameters(), "lr": 1e-2}])
    if state:
        state = torch.load(io.BytesIO(saved(state)), weights_only=True)
        network.load_state_dict(state["G"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, last + 1):
        # Frozen at first: some of the optimizer's state is loaded, the rest made after the resume.
        network[0].requires_grad_(step > 2)
        optimizer.zero_grad()
        network(torch.linspace(-1, 1, 15).reshape(5, 3)).square().sum().backward()
        optimizer.step()
    return HostCopy().of({"G": network.state_dict(), "optimizer": optimizer.state_dict()})


def test_a_resumed_training_writes_the_bytes_of_an_uninterrupted_one():
    assert saved(trained(4, 5, trained(2, 3, trained(1, 1)))) == saved(trained(1, 5))


def test_the_copy_stays_as_the_state_moves_on():
    state = {"w": torch.zeros(3), "nested": [{"v": torch.zeros(2)}, {"v": torch.ones(2)}]}
    copied = HostCopy().of(state)
    state["w"] += 1
    state["nested"][0]["v"] += 1
    assert copied["w"].tolist() == [0, 0, 0]
    assert [each["v"].tolist() for each in copied["nested"]] == [[0, 0], [1, 1]]


def test_buffers_are_reused_unless_the_shape_or_type_changes():
    copy = HostCopy()
    first = copy.of({"w": torch.zeros(3)})["w"]
    assert copy.of({"w": torch.ones(3)})["w"] is first
    assert first.tolist() == [1, 1, 1]
    assert copy.of({"w": torch.ones(4)})["w"].shape == (4,)
    assert copy.of({"w": torch.ones(4, dtype=torch.float64)})["w"].dtype == torch.float64


def test_the_layout_in_memory_does_not_show_in_the_bytes():
    plain = torch.arange(6.0).reshape(2, 3)
    turned = plain.t().contiguous().t()
    part_of_more = torch.arange(12.0).reshape(4, 3)[:2]
    shared = {"a": plain, "b": plain}
    apart = {"a": plain, "b": plain.clone()}
    copy: Callable[[object], bytes] = lambda tree: saved(HostCopy().of(tree))  # noqa: E731
    assert copy({"w": plain}) == copy({"w": turned}) == copy({"w": part_of_more})
    assert copy(shared) == copy(apart)
