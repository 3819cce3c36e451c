"""`vrt drill`: the user's own proof, on real services, and that it leaves nothing behind."""

import os
import shutil
import signal
from pathlib import Path

import boto3
import pytest
from mlflow import MlflowClient

from vrt.checkpoint.manifest import FileEntry
from vrt.checkpoint.phases import Phase
from vrt.stages.drilled import Kill, Recovery, Verdict, plan, read_log

REPOSITORY = Path(__file__).parents[2]


def traces(workspace) -> list[str]:
    """Whatever a drill of this workspace has left anywhere."""
    client = MlflowClient()
    models = [model.name for model in client.search_registered_models() if f"drill-{workspace.name}" in model.name]
    experiment = client.get_experiment_by_name("vrt")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    named = [run.info.run_name for run in runs if f"drill-{workspace.name}" in run.info.run_name]
    return models + named + [str(path) for path in workspace.root.glob(".drill/drill-*")]


def objects() -> set[str]:
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="mlflow")
    return {entry["Key"] for page in pages for entry in page.get("Contents", [])}


@pytest.mark.long
def test_a_drill_proves_the_recipe_and_leaves_nothing_behind(make_workspace, services):
    workspace = make_workspace("drilled")
    before = objects()
    ended = workspace.vrt("drill", "--phase", "read-back", "--steps", "2")
    assert ended.returncode == 0, ended.stdout
    assert "PROVED: at most" in ended.stdout and "bit-identical to the uninterrupted twin's" in ended.stdout
    assert "kill 1 of 1: read-back" in ended.stdout and "steps lost), training again after" in ended.stdout
    assert "removed drill-drilled" in ended.stdout
    assert traces(workspace) == [] and objects() == before


@pytest.mark.long
def test_ctrl_c_ends_a_drill_with_everything_removed(make_workspace, services):
    workspace = make_workspace("interrupted")
    before = objects()
    drill = workspace.start("vrt", "drill", "--phase", "alias", "--phase", "step", start_new_session=True)
    workspace.wait_for("kill 2 of 2", drill)
    os.killpg(drill.pid, signal.SIGINT)
    assert drill.wait(120) == 130, workspace.log.read_text()
    assert "removed drill-interrupted" in workspace.log.read_text()
    assert traces(workspace) == [] and objects() == before


@pytest.mark.long
def test_a_drill_without_data_generates_some_and_clears_what_a_killed_drill_left(make_workspace, services):
    workspace = make_workspace("without")
    shutil.rmtree(workspace.root / "data/prepared")
    shutil.copytree(REPOSITORY / "data/raw/quickstart", workspace.root / "data/raw/quickstart")
    before = objects()
    drill = workspace.start("vrt", "drill", "--phase", "step", "--phase", "step", start_new_session=True)
    workspace.wait_for("kill 2 of 2", drill)
    os.killpg(drill.pid, signal.SIGKILL)
    drill.wait()
    assert traces(workspace) != []

    ended = workspace.vrt("drill", "--phase", "step", "--steps", "2")

    assert ended.returncode == 0, ended.stdout
    assert "drilling with generated clips" in ended.stdout
    assert ended.stdout.count("removed drill-without") == 3
    assert traces(workspace) == [] and objects() == before


A, B = FileEntry("2_G.pth", 1, "a"), FileEntry("2_G.pth", 1, "b")
SOUND = Recovery(Kill("upload", 1), at=3, registered=2, resumed=2, seconds=1.0)


@pytest.mark.parametrize(
    "verdict, reasons",
    [
        (Verdict([SOUND], 2, [], {2: (A,)}, {2: (A,)}), []),
        (Verdict([SOUND], 2, [], {2: (A,)}, {2: (B,)}), ["step 2: 2_G.pth differs from the twin's"]),
        (Verdict([], 2, [], {}, {2: (A,)}), ["step 2: only the twin has this checkpoint"]),
        (Verdict([], 2, ["step 2: torn"], {2: (A,)}, {2: (A,)}), ["step 2: torn"]),
        (
            Verdict([Recovery(Kill("alias", 1), at=5, registered=4, resumed=2)], 2, [], {2: (A,)}, {2: (A,)}),
            ["alias #1: resumed from step 2, although step 4 was registered"],
        ),
        (
            Verdict([Recovery(Kill("repair", 9), at=None, registered=0)], 2, [], {2: (A,)}, {2: (A,)}),
            ["repair #9: was not reached, so nothing is proved of it"],
        ),
    ],
)
def test_only_what_is_proved_has_no_reason_against_it(verdict: Verdict, reasons: list[str]):
    assert verdict.reasons == reasons


def test_the_plan_is_a_function_of_the_seed_and_leaves_out_no_phase():
    assert plan([], None, 7, 2) == plan([], None, 7, 2) != plan([], None, 8, 2)
    assert {kill.where for kill in plan([], None, 7, 2)} == {*Phase, "seconds"}
    assert [kill.where for kill in plan([Phase.UPLOAD, Phase.ALIAS], 3, 7, 2)] == ["upload", "alias", "upload"]


def test_the_log_of_an_attempt_says_where_it_came_from_and_went():
    continuing = "09:00:00 INFO    x, attempt 2: continuing after step 8 of 24 (registered)\n"
    spoken = read_log(f"{continuing}09:00:01 WARNING VRT_KILL_AT=upload:1 ends this process with SIGKILL after 3 steps\n")
    assert (spoken.continued, spoken.killed, spoken.steps) == (8, True, 3)
    spoken = read_log("x: starting at step 1 of 24\n")
    assert (spoken.continued, spoken.killed, spoken.steps) == (0, False, 0)
    assert read_log("").continued is None
