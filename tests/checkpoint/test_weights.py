"""Weight files: whichever form, the same names in the same order with the same bits."""

import json
import struct
from pathlib import Path

import pytest
import torch

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.weights import TRAINED, Weights, read_weights, write_weights

TENSORS = {
    "z.weight": torch.randn(3, 4),
    "a.index": torch.arange(6).view(2, 3),
    "m.half": torch.randn(2, 2).half(),
    "b.nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    "c.scalar": torch.tensor(1.5, dtype=torch.float64),
    "d.turned": torch.randn(4, 3).t(),
}


def same(found: Weights, expected: Weights) -> bool:
    """Also where NaN and the sign of zero are concerned."""
    bits = [{key: (value.dtype, value.shape, value.contiguous().numpy().tobytes()) for key, value in w.tensors.items()} for w in (found, expected)]
    return found.nesting == expected.nesting and list(found.tensors) == list(expected.tensors) and bits[0] == bits[1]


@pytest.mark.parametrize("nesting", ["", "params", "params_ema"])
def test_there_and_back_loses_nothing(nesting: str, tmp_path: Path):
    original = Weights(TENSORS, nesting)
    write_weights(original, tmp_path / "published.pth")
    write_weights(read_weights(tmp_path / "published.pth"), tmp_path / "model.safetensors")
    write_weights(read_weights(tmp_path / "model.safetensors"), tmp_path / "back.pth")
    assert all(same(read_weights(tmp_path / name), original) for name in ("published.pth", "model.safetensors", "back.pth"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "model.safetensors", "published.pth"]
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(content) == ([nesting] if nesting else list(TENSORS))


def test_tensors_that_are_one_under_two_names_are_written_under_both(tmp_path: Path):
    tensor = torch.rand(6)
    torch.save({"a": tensor, "b": tensor, "c": tensor[3:]}, tmp_path / "tied.pth")
    write_weights(read_weights(tmp_path / "tied.pth"), tmp_path / "tied.safetensors")
    assert same(read_weights(tmp_path / "tied.safetensors"), Weights({"a": tensor, "b": tensor, "c": tensor[3:]}, ""))


def test_the_averaged_weights_are_taken_where_a_file_has_both(tmp_path: Path):
    torch.save({"params": {"w": torch.zeros(1)}, "params_ema": {"w": torch.ones(1)}}, tmp_path / "both.pth")
    assert read_weights(tmp_path / "both.pth").tensors["w"].item() == 1


def test_those_that_are_trained_on_are_taken_where_they_are_asked_for(tmp_path: Path):
    torch.save({"params": {"w": torch.zeros(1)}, "params_ema": {"w": torch.ones(1)}}, tmp_path / "both.pth")
    torch.save({"params_ema": {"w": torch.ones(1)}}, tmp_path / "one.pth")
    found = [read_weights(tmp_path / name, TRAINED) for name in ("both.pth", "one.pth")]
    assert [(weights.nesting, weights.tensors["w"].item()) for weights in found] == [("params", 0), ("params_ema", 1)]


def test_safetensors_of_others_are_read_too(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"b": torch.ones(2), "a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert set(read_weights(tmp_path / "other.safetensors").tensors) == {"a", "b"}


def test_what_is_there_is_never_overwritten(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="model.safetensors: exists already; move it away"):
        write_weights(Weights(TENSORS, ""), tmp_path / "model.safetensors")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(CheckpointError, match="can't be written"):
        write_weights(Weights(TENSORS, ""), tmp_path / "missing" / "model.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_asks_for_no_known_form_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"expected a name that ends in .pth or .safetensors, found '.onnx'"):
        write_weights(Weights(TENSORS, ""), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        struct.pack("<Q", 30) + json.dumps({"w": {"dtype": "F32"}}).encode().ljust(30),
    ],
    ids=["empty", "noise", "no header of tensors"],
)
def test_a_damaged_safetensors_file_is_named(content: bytes, tmp_path: Path):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.safetensors: can't be read as safetensors"):
        read_weights(tmp_path / "bad.safetensors")


def test_a_missing_file_and_a_file_of_other_things_are_told_apart(tmp_path: Path):
    with pytest.raises(CheckpointError, match="none.pth: no such file"):
        read_weights(tmp_path / "none.pth")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pth")
    with pytest.raises(CheckpointError, match="found dict with other things than tensors; expected a network's state dict"):
        read_weights(tmp_path / "optimizer.pth")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, torch.ones(1), {"params": {"a": 1}}], ids=["list", "numbers", "tensor", "nested"])
def test_what_is_no_network_is_named(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "G.pth")
    with pytest.raises(CheckpointError, match=r"G\.pth: .*expected a network's state dict"):
        read_weights(tmp_path / "G.pth")
