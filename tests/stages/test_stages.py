"""The stages as DVC runs them: what they read, and that any video goes through them."""

import av
import numpy as np
import pytest
from ruamel.yaml import YAML

from vrt.data.clips import PreparedData
from vrt.lifecycle import EXIT_CONTINUE_ME
from vrt.params import Data, Evaluate, Network, Noise, Optimizer, Params, Train, load_params
from vrt.stages.evaluate import run_evaluation
from vrt.typed_yaml import Section

SECTIONS = {Params: "", Data: "data.", Evaluate: "evaluate.", Network: "network.", Noise: "degradation.", Optimizer: "optimizer.", Train: "train."}


@pytest.fixture
def keys_read(monkeypatch):
    """Fills with the dotted key of every parameter that is read from now on."""
    keys: set[str] = set()
    read = Section.__getattribute__

    def record(section, name):
        if type(section) in SECTIONS and name in type(section).model_fields:
            keys.add(SECTIONS[type(section)] + name)
        if name == "model_dump" and type(section) in SECTIONS:
            keys.update(SECTIONS[type(section)] + field for field in type(section).model_fields)
        return read(section, name)

    monkeypatch.setattr(Section, "__getattribute__", record)
    return keys


def test_evaluate_reads_exactly_the_params_that_dvc_yaml_lists(make_workspace, monkeypatch, keys_read):
    workspace = make_workspace("reads")
    workspace.edit(train__total_steps=1)
    assert workspace.vrt("train").returncode == 0

    monkeypatch.chdir(workspace.root)
    for key, value in workspace.environment.items():
        monkeypatch.setenv(key, value)
    params = load_params(workspace.root / "params.yaml")
    for module in ("vrt.stages.evaluate", "vrt.params"):
        monkeypatch.setattr(f"{module}.load_params", lambda _: params)
    keys_read.clear()

    run_evaluation(workspace.root / "params.yaml")

    listed = set(YAML(typ="safe").load((workspace.root / "dvc.yaml").read_text())["stages"]["evaluate"]["params"])
    assert {key.split(".")[0] for key in keys_read} == listed


def test_train_lists_every_section_but_the_name_of_the_data_set(make_workspace):
    stages = YAML(typ="safe").load((make_workspace("lists").root / "dvc.yaml").read_text())["stages"]
    expected = (set(Params.model_fields) - {"data"}) | {"data.workers", "data.damaged"}
    assert set(stages["train"]["params"]) == expected
    assert stages["prepare"]["params"] == ["data.dataset"]


def test_params_that_change_while_it_trains_are_not_taken_for_those_that_it_trained_by(make_workspace):
    workspace = make_workspace("changes")
    workspace.edit(train__total_steps=8)
    training = workspace.start("vrt", "train")
    workspace.wait_for("checkpoint 1 registered", training)
    workspace.edit(train__total_steps=9)
    # DVC takes what ends so for failed, and writes nothing into its lock.
    assert training.wait(120) == EXIT_CONTINUE_ME
    assert "params.yaml changed while this trained; start it again, and it goes on by: train.total_steps: 8 -> 9" in workspace.log.read_text()
    assert not (workspace.root / "model").exists()
    again = workspace.vrt("train")
    assert again.returncode == 0 and "continuing after step 8 of 9" in again.stdout, again.stdout


@pytest.mark.long
def test_a_real_video_is_imported_prepared_and_trained_on(make_workspace):
    workspace = make_workspace("video")
    with av.open(workspace.root / "holiday.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            picture = np.add.outer(np.arange(48), np.arange(64) + 3 * number).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.stack([picture, picture, 255 - picture], 2), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    imported = workspace.vrt("data", "import", "holiday.mp4", "--name", "holiday")
    assert imported.returncode == 0, imported.stdout
    assert "set data.dataset: holiday in params.yaml" in imported.stdout
    workspace.edit(data__dataset="holiday", train__total_steps=2)
    assert workspace.run("dvc", "add", "data/raw/holiday").returncode == 0
    ended = workspace.run("dvc", "repro")

    assert ended.returncode == 0, ended.stdout
    assert PreparedData.open(workspace.root / "data/prepared").index.dataset == "holiday"
    assert "dB" in ended.stdout
    assert "gain_db" in workspace.run("dvc", "metrics", "show").stdout


SUPER_RESOLUTION = {"degradation": {"kind": "bicubic", "scale": 4}, "network__upscale": 4, "train__crop": 32}
NON_BLIND = {"network__nonblind_denoising": True, "degradation__sigma_min": 0}
WITHOUT_EMA = {"train__ema_decay": 0}
INTERPOLATION = {
    "degradation": {"kind": "between"},
    **{"network__pa_frames": 0, "network__deformable_groups": 0, "optimizer__flow_names": [], "evaluate__overlap": [0, 8, 8]},
}
TWO_WORKERS = {"data__workers": 2, "train__batch_size": 2}


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        # The recipes' own tests train these in the test's process; here whole commands do.
        pytest.param(SUPER_RESOLUTION, id="x4"),
        pytest.param(NON_BLIND, id="non-blind"),
        pytest.param(WITHOUT_EMA, id="no EMA"),
        pytest.param(INTERPOLATION, id="between"),
        pytest.param(TWO_WORKERS, id="workers"),
    ],
)
def test_every_kind_of_training_trains_resumes_and_is_evaluated(make_workspace, changes):
    workspace = make_workspace("kind")
    workspace.edit(**changes, train__total_steps=2)
    assert workspace.vrt("train").returncode == 0
    workspace.edit(train__total_steps=3)
    ended = workspace.vrt("train")
    assert ended.returncode == 0 and "continuing after step 2 of 3" in ended.stdout, ended.stdout
    ended = workspace.vrt("evaluate")
    assert ended.returncode == 0 and "dB PSNR" in ended.stdout, ended.stdout
    assert (workspace.root / "model/3_E.pth").exists() == (changes is not WITHOUT_EMA)


def test_a_failing_stage_leaves_the_reason_in_dvcs_output(make_workspace):
    workspace = make_workspace("reason")
    workspace.edit(data__dataset="tiny", train__crop=4096)
    ended = workspace.run("dvc", "repro")
    assert ended.returncode != 0
    assert "4096" in ended.stdout and "Traceback" not in ended.stdout
