"""Host copies: what is written is the state at the time of the save, in the same bytes whatever its history."""

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from vrt.checkpoint.snapshot import Aliases, HostCopy, _Walk, spoiled


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


def test_constants_are_copied_once_and_again_only_when_they_were_changed_after_all():
    network = nn.BatchNorm1d(2)
    constants = list(network.buffers())
    copy = HostCopy()
    take = lambda: copy.of({"G": network.state_dict()}, constants)["G"]["running_mean"]  # noqa: E731
    host = take()
    # Whatever stands in the buffer stays there: nothing was copied.
    host.fill_(7)
    assert take().tolist() == [7, 7]
    network.load_state_dict(network.state_dict() | {"running_mean": torch.tensor([1.0, 2.0])})
    assert take().tolist() == [1, 2]
    network.running_mean = torch.tensor([3.0, 4.0])
    constants[0] = network.running_mean
    assert take().tolist() == [3, 4]
    # What is not declared a constant is copied each time, whether torch saw it change or not.
    host = copy.of({"w": constants[0]})["w"].fill_(7)
    assert copy.of({"w": constants[0]})["w"].tolist() == [3, 4]


def test_constants_of_a_copy_that_was_interrupted_are_copied_by_the_next(monkeypatch):
    network = {"weight": torch.ones(3), "index": torch.arange(4)}
    copy, real = HostCopy(), torch._foreach_copy_

    def interrupted(*arguments):
        raise KeyboardInterrupt

    for tree in (Aliases(network), network):
        monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copy.of({"G.pth": tree}, [network["index"]])
        monkeypatch.setattr(torch, "_foreach_copy_", real)
        copied = copy.of({"G.pth": tree}, [network["index"]])["G.pth"]
        assert copied["index"].tolist() == [0, 1, 2, 3] and copied["weight"].tolist() == [1, 1, 1]


def test_what_is_planned_once_is_copied_as_what_is_looked_at_each_time():
    network = nn.BatchNorm1d(2)
    aliases, constants, copy = Aliases(network.state_dict()), list(network.buffers()), HostCopy()
    for value in (1.0, 2.0):
        with torch.no_grad():
            network.weight.fill_(value)
            network.running_var.fill_(value)
        copied = copy.of({"G": aliases}, constants)
        assert saved(copied) == saved(HostCopy().of({"G": network.state_dict()}))
    # Nothing was copied that did not change.
    copied["G"]["running_var"].fill_(7)
    assert copy.of({"G": aliases}, constants)["G"]["running_var"].tolist() == [7, 7]


def test_the_threads_share_the_bytes_evenly_and_copy_all():
    trees = {"small": [torch.full((1,), float(i)) for i in range(100)], "large": torch.arange(400.0), "empty": torch.zeros(0)}
    walk = _Walk((), {})
    walk.copy(trees, {}, "")
    assert [[tensor.numel() for tensor in walk.live[share]] for share in walk.shares(2)] == [[1] * 100, [400, 0]]
    for count in range(1, 6):
        covered = [i for share in walk.shares(count) for i in range(share.start, share.stop)]
        assert covered == list(range(102))
    assert saved(HostCopy().of(trees)) == saved({**trees, "small": [tensor.clone() for tensor in trees["small"]]})


@pytest.mark.parametrize(
    "tree, place",
    [
        ({"G.pth": {"a.weight": torch.tensor([1.0, float("nan")])}}, "G.pth a.weight"),
        ({"G.pth": {"a": torch.ones(2)}, "o.pth": {"state": {3: {"exp_avg": torch.tensor(float("inf"))}}}}, "o.pth state 3 exp_avg"),
        ({"G.pth": [torch.tensor([float("inf"), -float("inf")])]}, "G.pth 0"),
        (
            {"G.pth": {"a": torch.tensor([3e38, 3e38]), "i": torch.tensor([2**62] * 2), "text": "nan", "lr": float("inf"), "e": torch.ones(0)}},
            None,
        ),
    ],
)
def test_the_first_value_that_is_no_number_is_found(tree, place):
    assert spoiled(tree) == place


def test_a_gpu_does_not_change_what_is_still_being_copied(gpu):
    live = torch.zeros(64 << 20, device=gpu)
    copy = HostCopy()
    for value in range(1, 4):
        live.fill_(value)
        host = copy.of({"w": live})["w"]
        live.fill_(-1)
        copy.wait()
        assert host.is_pinned()
        assert host.eq(value).all()
