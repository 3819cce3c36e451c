"""Tensor files: equal content is equal bytes, and a bad file is named, not run."""

import errno
import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from vrt.checkpoint.errors import CheckpointError, MachineShort
from vrt.checkpoint.serialize import HashingWriter, fitting, load, misfits, optimizer_misfits, sha256_of

TREE = {"weight": torch.arange(12.0).reshape(3, 4), "state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.99)}}, "names": ["a", "b"]}


def saved(tree: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def save(tree: object, path: Path) -> HashingWriter:
    with path.open("wb") as file:
        writer = HashingWriter(file)
        torch.save(tree, writer)
    return writer


def test_equal_content_gives_equal_bytes_whatever_the_file_is_called(tmp_path: Path):
    save(TREE, tmp_path / "40_G.pth")
    save(TREE, tmp_path / "another.pth")
    assert (tmp_path / "40_G.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()


def test_the_writer_knows_size_and_digest_of_what_was_written(tmp_path: Path):
    writer = save(TREE, tmp_path / "G.pth")
    content = (tmp_path / "G.pth").read_bytes()
    assert (writer.size, writer.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sha256_of(tmp_path / "G.pth") == writer.sha256


def test_tensors_and_plain_values_come_back(tmp_path: Path):
    save(TREE, tmp_path / "G.pth")
    loaded = load(tmp_path / "G.pth")
    assert torch.equal(loaded["weight"], TREE["weight"])
    assert loaded["state"][0]["betas"] == (0.9, 0.99)
    assert loaded["names"] == ["a", "b"]


class Malicious:
    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


@pytest.mark.parametrize("write", [lambda content: pickle.dumps(content, protocol=2), saved], ids=["bare pickle", "torch file"])
def test_a_pickle_of_code_does_not_run_and_is_named(tmp_path: Path, write):
    mark, path = tmp_path / "it ran", tmp_path / "G.pth"
    path.write_bytes(write({"weight": torch.zeros(2), "x": Malicious(mark)}))
    with pytest.raises(CheckpointError, match=f"{path}: can't be read as tensors and plain values .*; restore it or delete it"):
        load(path)
    assert not mark.exists()
    # What the test would see if it had run: the file is a working attack on a careless reader.
    torch.load(path, weights_only=False) if write is saved else pickle.loads(path.read_bytes())
    assert mark.exists()


@pytest.mark.parametrize("length", [0, 1, 3, 4, 30, 0.1, 0.5, 0.9, -1])
def test_a_truncated_file_is_named(tmp_path: Path, length: float):
    content = saved(TREE)
    path = tmp_path / "G.pth"
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(CheckpointError, match=f"{path}: can't be read"):
        load(path)


def saved_by_old_torch(tree: object) -> bytes:
    """As torch wrote files before 1.6: a chain of pickles. Published weights may be that old."""
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


WHOLE = {"torch file": saved(TREE), "old torch file": saved_by_old_torch(TREE), "empty": b""}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(list(WHOLE)),
    start=st.floats(0, 1),
    noise=st.binary(max_size=20),
    cut=st.booleans(),
)
def test_damage_anywhere_is_a_checkpoint_error_or_harmless(tmp_path: Path, kind: str, start: float, noise: bytes, cut: bool):
    content = WHOLE[kind]
    position = int(start * len(content))
    path = tmp_path / "G.pth"
    path.write_bytes(content[:position] + noise + (b"" if cut else content[position + len(noise) :]))
    try:
        load(path)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match="40_G.pth"):
        load(tmp_path / "40_G.pth")


def test_every_key_that_does_not_fit_is_named():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    weights = network.state_dict()
    assert misfits(weights, network.state_dict()) == []
    weights["2.weight"] = weights.pop("0.bias")
    weights["1.weight"] = torch.zeros(2, 5)
    assert misfits(weights, network.state_dict()) == [
        "missing: 0.bias",
        "unexpected: 2.weight",
        "misshapen: 1.weight is [2, 5], the network has [2, 4]",
    ]


def test_what_fits_is_found_by_name_never_by_position():
    # The same shapes in the same order, under other names but for one.
    weights = {"first": torch.ones(2), "second": torch.ones(3), "third": torch.ones(2, 2)}
    network = {"one": torch.zeros(2), "second": torch.zeros(3), "third": torch.zeros(4)}
    taken, left = fitting(weights, network)
    assert list(taken) == ["second"]
    assert left == ["missing: one", "unexpected: first", "misshapen: third is [2, 2], the network has [4]"]


@pytest.mark.parametrize(
    "saved, told",
    [
        ([], "found list; expected an optimizer's state dict with `state` and `param_groups`"),
        ({"state": {}}, "found dict; expected an optimizer's state dict"),
        ({"state": {}, "param_groups": [{}]}, "a parameter group has no list of parameters"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, "its groups have [1] parameters, the network's have [2]"),
        ({"state": {1: 5}, "param_groups": [{"params": [0, 1]}]}, "the state of b is int; expected values by name"),
        (
            {"state": {1: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"params": [0, 1]}]},
            "misshapen: exp_avg of b is [2], the parameter is [3]",
        ),
    ],
)
def test_each_way_in_which_an_optimizer_does_not_fit_is_named(saved, told):
    (problem,) = optimizer_misfits(saved, [[("a", torch.zeros(2)), ("b", torch.zeros(3))]])
    assert problem.startswith(told)


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError(), OSError(errno.EMFILE, "full")]
)
def test_what_this_machine_lacks_is_not_taken_for_damage(tmp_path: Path, monkeypatch, error: Exception):
    save(TREE, tmp_path / "G.pth")
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: (_ for _ in ()).throw(error))
    with pytest.raises(MachineShort, match=r"G\.pth: this machine can't read it \(.+\), which says nothing of the file; free memory, or use another"):
        load(tmp_path / "G.pth")
