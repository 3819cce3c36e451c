"""Folders that KAIR wrote, without manifests: the newest files that agree become a checkpoint, and the others are named."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.stages.adopt import adopt, disagreement, steps_by_part
from vrt.training.ema import copy_for_ema
from vrt.training.history import History
from vrt.training.loop import TrainingState
from vrt.training.session import restore


def fresh(width: int = 3) -> TrainingState:
    network = nn.Linear(width, 2)
    optimizer = torch.optim.Adam([{"params": network.parameters(), "lr": 0.1, "initial_lr": 0.1}])
    return TrainingState(network, copy_for_ema(network), optimizer, History(), 0)


class Written:
    """A folder in which KAIR's three files of any step can be written, each on its own."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()

    def write(self, step: int, *parts: str, width: int = 3) -> None:
        state = fresh(width)
        nn.init.constant_(state.network.weight, step)
        state.network(torch.ones(width)).sum().backward()
        state.optimizer.step()
        contents = {"G": state.network.state_dict(), "E": state.ema.state_dict(), "optimizerG": state.optimizer.state_dict()}
        for part in parts:
            torch.save(contents[part], self.path / f"{step}_{part}.pth")


ALL = ("G", "E", "optimizerG")


@pytest.fixture
def kair(tmp_path: Path) -> Written:
    return Written(tmp_path / "models")


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    made = CheckpointFolder(tmp_path / "checkpoints")
    made.prepare()
    return made


def test_disagreeing_files_resolve_to_the_newest_step_at_which_all_agree(kair, folder, caplog):
    kair.write(500, *ALL)
    kair.write(1000, *ALL)
    kair.write(2000, "G", "E")
    state = fresh()
    manifest = adopt(kair.path, folder, "tiny-1", state, {"seed": 1}, {"host": "here"})
    assert (manifest.step, [file.name for file in manifest.files]) == (
        1000,
        ["1000_G.pth", "1000_E.pth", "1000_optimizerG.pth", "1000_history.jsonl"],
    )
    assert "the newest files disagree: G.pth 2000, E.pth 2000, optimizerG.pth 1000; taking the newest step at which they agree" in caplog.text
    assert "not adopting step 2000: 2000_optimizerG.pth is missing" in caplog.text
    assert (manifest.identity, manifest.origin["host"], manifest.origin["adopted"]) == ({"seed": 1}, "here", "files without a manifest")
    assert folder.problems(1000, "tiny-1") == []
    assert not state.optimizer.state
    restore(state, manifest, folder.path)
    assert state.step == 1000 and state.optimizer.state
    assert sorted(path.name for path in kair.path.iterdir())[:3] == ["1000_E.pth", "1000_G.pth", "1000_optimizerG.pth"], "the original stays"


class Malicious:
    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


def test_each_step_that_is_no_good_is_named_and_none_of_its_code_is_run(kair, folder, caplog, tmp_path):
    kair.write(10, *ALL)
    kair.write(20, *ALL, width=4)
    kair.write(30, *ALL)
    torch.save({"weight": Malicious(tmp_path / "it ran")}, kair.path / "30_G.pth")
    kair.write(40, *ALL)
    (kair.path / "40_E.pth").write_bytes((kair.path / "40_E.pth").read_bytes()[:100])
    assert adopt(kair.path, folder, "tiny-1", fresh(), {}, {}).step == 10
    for told in (
        f"not adopting step 40: {kair.path}/40_E.pth: can't be read",
        f"not adopting step 30: {kair.path}/30_G.pth: can't be read as tensors and plain values",
        "misshapen: weight is [2, 4], the network has [2, 3]",
    ):
        assert told in caplog.text
    assert not (tmp_path / "it ran").exists()
    with pytest.raises(CheckpointError, match="step 10 is there already; `vrt checkpoints show 10` tells about it"):
        adopt(kair.path, folder, "tiny-1", fresh(), {}, {})


def test_without_any_e_g_and_the_optimizer_suffice(kair, folder):
    kair.write(10, "G", "optimizerG")
    state = fresh()
    restore(state, adopt(kair.path, folder, "tiny-1", state, {}, {}), folder.path)
    assert torch.equal(state.ema.weight, state.network.weight)


def test_a_folder_with_nothing_to_adopt_says_what_is_expected(kair, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"models: expected files such as 2000_G.pth and 2000_optimizerG.pth, found none"):
        adopt(kair.path, folder, "tiny-1", fresh(), {}, {})
    with pytest.raises(CheckpointError, match="nowhere: expected files such as"):
        adopt(tmp_path / "nowhere", folder, "tiny-1", fresh(), {}, {})
    kair.write(10, "G", "E")
    with pytest.raises(CheckpointError, match="no step can be adopted:\n  step 10: 10_optimizerG.pth is missing"):
        adopt(kair.path, folder, "tiny-1", fresh(), {}, {})
    assert folder.steps() == []


@pytest.mark.parametrize(
    "names, told",
    [
        (["10_G.pth", "10_E.pth", "10_optimizerG.pth", "train.log", "G.pth", "20_other.pth", "x_G.pth"], ""),
        (["10_G.pth", "10_optimizerG.pth"], ""),
        (["10_G.pth", "20_optimizerG.pth"], "G.pth 10, optimizerG.pth 20"),
    ],
)
def test_only_the_newest_of_each_part_can_disagree(names, told):
    assert told in disagreement(steps_by_part(names)) and bool(told) == bool(disagreement(steps_by_part(names)))
