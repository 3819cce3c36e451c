"""How a training begins, by its policy: against real servers, and with real training in between."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.store import S3Store
from vrt.data.clips import PreparedData
from vrt.lifecycle import EXIT_CONTINUE_ME, EXIT_DONE, ToldToStop
from vrt.model.network import VRT
from vrt.params import load_params
from vrt.stages import CHECKPOINTS, MODEL, PREPARED
from vrt.stages import train as stage
from vrt.stages.lineage import lineage_of
from vrt.stages.train import run_training
from vrt.training.loop import Validation

SCORES = {4: 30.0, 8: 34.0, 12: 31.0, 16: 35.0}


class Project:
    """A workspace as the current folder, trained in this process."""

    def __init__(self, workspace, caplog):
        self.edit, self._caplog = workspace.edit, caplog

    def train(self, steps: int, resume: str | None = None, **changes: object) -> str:
        """Train to `steps`; returns what was logged."""
        self.edit(train__total_steps=steps, **changes)
        self._caplog.clear()
        assert run_training(Path("params.yaml"), resume) == 0
        return self._caplog.text

    @property
    def lineage(self):
        return lineage_of(load_params(Path("params.yaml")), PreparedData.open(PREPARED))

    @property
    def folder(self) -> CheckpointFolder:
        return CheckpointFolder(CHECKPOINTS / self.lineage.id)

    def tags(self) -> dict[str, str]:
        client = MlflowClient()
        experiment = client.get_experiment_by_name("vrt").experiment_id
        (run,) = client.search_runs([experiment], f"tags.`vrt.lineage` = '{self.lineage.id}'")
        return run.data.tags

    def versions(self) -> dict[int, dict[str, str]]:
        found = MlflowClient().search_model_versions(f"name = '{self.lineage.model}' and tags.lineage = '{self.lineage.id}'")
        return {int(version.tags["step"]): version.tags for version in found}


@pytest.fixture
def project(make_workspace: Callable, services, monkeypatch, caplog) -> Project:
    workspace = make_workspace("start")
    workspace.edit(checkpoints__keep_last=9)
    monkeypatch.chdir(workspace.root)
    caplog.set_level("INFO", "vrt")
    threads = torch.get_num_threads()
    yield Project(workspace, caplog)
    torch.set_num_threads(threads)


def files(folder: CheckpointFolder, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.path.glob(f"{step}_*") if path.suffix != ".json"}


def test_a_fork_goes_on_as_its_parent_did_and_is_a_lineage_of_its_own_that_wins_once_it_exists(project):
    project.train(8)
    parent = project.lineage.id
    expected = files(project.folder, 8)
    for path in project.folder.path.iterdir():
        path.unlink()
    policy = f"fork {parent}@4"
    told = project.train(8, checkpoints__resume=policy)
    assert f"forked {parent}@4: going on at step 5 of 8" in told and f"{parent} is not continued; changed since: fork: none -> {parent}@4" in told
    # With all params equal a fork computes what its parent did: nothing was lost on the way.
    assert project.lineage.id != parent
    assert files(project.folder, 8) == expected
    assert project.folder.steps() == [8]
    assert project.folder.manifest(8).origin["parent"] == project.tags()["vrt.parent"] == project.versions()[8]["parent"] == f"{parent}@4"

    told = project.train(12)
    assert "continuing after step 8 of 12" in told and "forked" not in told
    project.edit(checkpoints__resume="auto", seed=7)
    with pytest.raises(CheckpointError, match=rf"changed since:\n  seed: 1 -> 7\n  fork: {parent}@4 -> none\nTo go on with that one, put these"):
        run_training(Path("params.yaml"))
    for wrong, reason in (
        (f"fork {parent}@6", f"{parent}: resume is 6, but there is no such checkpoint; found: 8, 4"),
        (f"fork {parent[:-1]}@4", f"did you mean {parent}"),
        (f"fork {parent}@12", "the fork goes on at step 13; raise train.total_steps, which is 12"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            run_training(Path("params.yaml"), wrong)

    # What was saved and, for whatever reason, not registered is as good, also where older ones are registered.
    project.edit(checkpoints__resume=policy, seed=1)
    child, registry = project.lineage.id, Curator(project.lineage)
    assert registry.attach()
    registry.unregister(12)
    assert f"forked {child}@12: going on at step 13 of 13" in project.train(13, checkpoints__resume=f"fork {child}@12")


@pytest.fixture
def cut_short(monkeypatch) -> set[int]:
    """Validations have the scores of SCORES; at the steps that are in this set they are told to stop, once."""
    steps, real = set(), stage.train

    def train(params, state, batches, checkpoints, validate, *rest):
        def measured(network) -> Validation:
            if state.step in steps:
                steps.remove(state.step)
                raise ToldToStop("received SIGTERM")
            found = validate(network)
            return Validation(found.metrics | {"psnr": SCORES[state.step]}, found.preview)

        return real(params, state, batches, checkpoints, measured, *rest)

    monkeypatch.setattr(stage, "train", train)
    return steps


def test_a_validation_made_up_for_later_counts_and_keeps_its_step_among_the_best(project, cut_short):
    def scores() -> dict[int, str | None]:
        return {step: tags.get("val_psnr") for step, tags in project.versions().items()}

    cut_short |= {8, 16}
    project.edit(train__total_steps=16, checkpoints__keep_last=1, checkpoints__keep_best=1)
    assert run_training(Path("params.yaml")) == EXIT_CONTINUE_ME
    assert scores() == {4: "30", 8: None}, "what another step was worth is not said of this one"
    assert run_training(Path("params.yaml")) == EXIT_CONTINUE_ME
    assert scores() == {8: "34", 16: None}
    # The last one is not followed by another that would be registered.
    assert run_training(Path("params.yaml")) == EXIT_DONE
    assert scores() == {8: "34", 16: "35"}
    assert Curator(project.lineage).led_to("best") == (project.lineage.id, 16)


def test_with_fewer_steps_than_there_are_the_one_gone_back_to_stays_and_is_left_as_the_result(project):
    project.train(12)
    registry = Curator(project.lineage)
    assert registry.attach()
    # As if store and registry had been down when it was saved: this machine alone has it, and registers it now.
    address = registry.registered()[12].address
    registry.unregister(12)
    S3Store(registry.checkpoints_address).delete(address)

    project.train(8, checkpoints__keep_last=1, checkpoints__keep_best=0)

    assert project.versions().keys() == {8, 12}
    assert sorted(path.name for path in MODEL.iterdir()) == ["8_E.pth", "8_G.pth", "8_manifest.json"]
    project.edit(train__total_steps=7)
    with pytest.raises(CheckpointError, match=r"train\.total_steps is 7, and all its checkpoints lie beyond: 12, 8; raise it to 8 or more to go on"):
        run_training(Path("params.yaml"))
    assert project.folder.steps() == [12, 8], "nothing was moved aside"


def test_how_the_machine_computes_is_what_the_params_say(project, monkeypatch):
    compiled = []
    # The compiler itself would take minutes.
    monkeypatch.setattr(stage, "compile_blocks", lambda network: compiled.append((type(network), torch.backends.cudnn.allow_tf32)))
    project.train(1, train__compile=True, train__precision="fp32")
    assert compiled == [(VRT, False)]
    project.train(2, train__precision="tf32")
    assert compiled == [(VRT, False), (VRT, True)]


@pytest.mark.long
def test_a_step_is_gone_back_to_once_and_comes_out_the_same(project):
    project.train(8)
    before, versions = files(project.folder, 8), project.versions()
    told = project.train(8, checkpoints__resume=4)
    assert "continuing after step 4 of 8" in told and "(`vrt checkpoints prune --after 4`)" in told
    assert files(project.folder, 8) == before
    assert project.versions() == versions
    # Killed and started again, with the params as they are: what was done since is not lost.
    assert "continuing after step 8 of 9" in project.train(9)
    assert "continuing after step 9 of 9" in project.train(9, resume="4")
    assert "continuing after step 9 of 9" in project.train(9, resume="auto")
    assert "continuing after step 4 of 9" in project.train(9, resume="4"), "asked anew"


def test_never_and_must_refuse_what_they_are_for(project):
    with pytest.raises(CheckpointError, match="resume is must, but there is no checkpoint of this training"):
        project.train(4, resume="must")
    project.train(4, checkpoints__resume="never")
    assert "continuing after step 4 of 5" in project.train(5), "it began so, and is continued where it was killed"
    assert "continuing after step 5 of 6" in project.train(6, resume="must")
    for _ in ("once", "and again"):
        with pytest.raises(CheckpointError, match="resume is never, but there are checkpoints up to step 6"):
            project.train(7, resume="never")
        with pytest.raises(CheckpointError, match="resume is 99, but there is no such checkpoint"):
            project.train(7, resume="99")


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("it ran"),)


def test_what_can_not_be_continued_from_is_named_on_the_run_and_never_registered(project):
    project.train(4)
    good = project.folder.manifest(4)
    content = {file.name.removeprefix("4_"): (project.folder.path / file.name).read_bytes() for file in good.files}
    content["G.pth"] = pickle.dumps({"weight": Malicious()}, protocol=2)
    writes = {name: lambda file, data=data: file.write(data) for name, data in content.items()}
    project.folder.commit(6, writes, lambda all_files: Manifest(project.lineage.id, 6, all_files, {}, {}, {}))
    told = project.train(8)
    assert "continuing after step 4 of 8" in told
    assert "not continuing from step 6: " in told and "6_G.pth: can't be read as tensors and plain values" in told
    assert "6_G.pth: can't be read" in project.tags()["vrt.rejected"] and project.tags()["vrt.resumed"] == "after step 4 (local)"
    assert set(project.versions()) == {1, 4, 8}
    assert not Path("it ran").exists()


def test_only_what_the_params_keep_is_left_on_any_side(project):
    project.train(16, checkpoints__keep_last=2, checkpoints__keep_best=0)
    assert set(project.versions()) == {12, 16}
    assert project.folder.steps() == [16, 12]


def test_files_without_a_manifest_are_not_trained_over(project):
    project.folder.prepare()
    for part in ("G", "optimizerG"):
        (project.folder.path / f"4_{part}.pth").write_bytes(b"of another program")
    told = project.train(4)
    assert "the files of step 4 have no manifest" in told and "run `vrt checkpoints adopt` on that folder" in told
    assert (project.folder.path / "without-manifest/4-1/4_G.pth").read_bytes() == b"of another program"
