"""Where a flow run trains, by its parameters."""

import os

import pytest

from pipelines.process import PROJECT
from pipelines.project import make, plan
from vrt.params import load_params
from vrt.typed_yaml import ParamsError


def test_without_parameters_of_its_own_a_run_trains_in_the_project():
    project = plan(None, {})
    assert project.folder == PROJECT
    assert project.params == load_params(PROJECT / "params.yaml")


def test_a_recipe_and_values_train_in_a_workspace_that_the_same_training_finds_again():
    one = plan("006_videodeblurring_GoPro", {"train.total_steps": 10, "optimizer.lr": 1e-3})
    longer = plan("006_videodeblurring_GoPro", {"train.total_steps": 20, "optimizer.lr": 1e-3})
    other = plan("006_videodeblurring_GoPro", {"train.total_steps": 20})
    assert one.params.optimizer.lr == 1e-3 and one.params.train.total_steps == 10
    assert one.folder == longer.folder == PROJECT / ".vrt/workspaces" / one.key
    assert other.folder != one.folder
    forked = plan("006_videodeblurring_GoPro", {"train.total_steps": 20, "checkpoints.resume": "fork other-0123456789@8"})
    assert forked.folder not in (one.folder, other.folder)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.total_stepz": 3}, "train.total_stepz: found an unknown key, did you mean 'total_steps'?"),
        ({"train.total_steps": "many"}, 'train.total_steps: found "many"'),
        ({"trian.total_steps": 3}, "overrides: trian.total_steps: there is no section 'trian' in params.yaml; a key looks like train.total_steps"),
    ],
)
def test_wrong_values_are_named(overrides, message):
    with pytest.raises(ParamsError) as error:
        plan(None, overrides)
    assert message in str(error.value)


def test_a_workspace_has_the_stages_the_params_and_the_projects_raw_data_and_keeps_its_own_results(tmp_path, monkeypatch):
    project = plan(None, {"name": "other"})
    there = type(project)(tmp_path / "workspace", project.params)
    make(there)
    (there.folder / "dvc.lock").write_text("its own")
    (there.folder / "vrt/removed_since.py").touch()
    make(there)
    assert load_params(there.folder / "params.yaml") == project.params
    assert (there.folder / "dvc.lock").read_text() == "its own"
    assert not (there.folder / "vrt/removed_since.py").exists()
    assert (there.folder / "vrt/cli.py").read_bytes() == (PROJECT / "vrt/cli.py").read_bytes()
    assert os.path.samefile(there.folder / "data/raw", PROJECT / "data/raw")
    assert f"dir = {PROJECT / '.dvc/cache'}" in (there.folder / ".dvc/config.local").read_text()
