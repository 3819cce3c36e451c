"""Registered checkpoints at work: restoring, evaluating elsewhere, and choosing a champion; all with one small training."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError
from vrt.data.decoding import video_frames
from vrt.data.video import Footage, Look, write_segment
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_NOT_BETTER
from vrt.params import load_params
from vrt.stages.evaluate import test_clips as prepared_test_clips
from vrt.stages.promote import check_same_clips, judge
from vrt.stages.result import has_result
from vrt.stages.selector import choose

PARAMS = Path("params.yaml")


@pytest.fixture(scope="module")
def trained(make_workspace):
    workspace = make_workspace("used")
    workspace.edit(train__total_steps=8)
    ended = workspace.vrt("train")
    assert ended.returncode == 0, ended.stdout
    return workspace


@pytest.fixture
def here(trained, services, monkeypatch, tmp_path):
    """This process stands in the workspace; returns it."""
    monkeypatch.chdir(trained.root)
    return trained


@pytest.fixture
def lineage(trained) -> str:
    return next(path.name for path in (trained.root / "checkpoints").iterdir() if path.is_dir() and path.name.startswith(trained.name))


def test_every_way_to_name_a_checkpoint_leads_to_the_same_weights(here, lineage, tmp_path):
    latest = choose("latest", PARAMS)
    assert latest.name == f"{lineage}@8"
    run = MlflowClient().search_model_versions(f"name = 'vrt-{here.name}'")[0].run_id
    for selector in (f"{lineage}@8", f"{run}@8", f"checkpoints/{lineage}/8_E.pth"):
        assert choose(selector, PARAMS).sha256 == latest.sha256
    assert choose("best", PARAMS).name.startswith(f"{lineage}@")
    # Its network is its own, whatever the params file says now; and it is fetched where it is not here.
    here.edit(network__num_heads=[1] * 8)
    local = (here.root / "checkpoints" / lineage).rename(tmp_path / "elsewhere")
    try:
        elsewhere = choose(f"{lineage}@8", PARAMS)
        assert elsewhere.sha256 == latest.sha256 and elsewhere.params.network.num_heads == (2,) * 8
        assert (here.root / "checkpoints/fetched" / lineage / "8_E.pth").exists()
    finally:
        here.edit(network__num_heads=[2] * 8)
        local.rename(here.root / "checkpoints" / lineage)


def test_processes_that_fetch_the_same_step_wait_for_one_another(here, lineage, tmp_path):
    local = (here.root / "checkpoints" / lineage).rename(tmp_path / "elsewhere")
    shutil.rmtree("checkpoints/fetched", ignore_errors=True)
    try:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda _: choose(f"{lineage}@8", PARAMS).sha256, range(4)))
    finally:
        local.rename(here.root / "checkpoints" / lineage)
    assert len(set(found)) == 1
    kept = here.root / "checkpoints/fetched" / lineage
    assert not [path for path in kept.iterdir() if path.is_dir() or "unfinished" in path.name], "nothing was set aside, nothing left over"


def test_whether_the_result_of_a_step_is_here_is_told_by_the_model_not_by_the_checkpoint(here, lineage):
    named = lineage_named(lineage)
    assert has_result(named, 8) and not has_result(named, 4)
    (here.root / "model").rename(here.root / "gone")
    try:
        assert not has_result(named, 8)
    finally:
        (here.root / "gone").rename(here.root / "model")


def test_a_prepared_data_set_is_not_taken_for_another_one(here):
    shutil.copytree("data/raw/tiny", "data/raw/another", dirs_exist_ok=True)
    params = load_params(PARAMS)
    changed = params.model_copy(update={"data": params.data.model_copy(update={"dataset": "another"})})
    assert prepared_test_clips("another", changed).index.dataset == "another"
    assert prepared_test_clips("tiny", params).index.dataset == "tiny"


@pytest.mark.parametrize(
    "selector, message",
    [
        ("champion", "no version has the alias champion; make one with `vrt promote`, or name a checkpoint as LINEAGE@STEP"),
        ("LINEAGE@7", "there is no step 7; found: 8, 4, 1"),
        ("no-such-0123456789@7", "there is no lineage no-such-0123456789 with checkpoints"),
        ("00000000000000000000000000000000@7", "MLflow has no training of that id"),
        ("newest", "checkpoint 'newest': expected latest, best, champion, LINEAGE@STEP, RUN@STEP, or a file of weights"),
        ("nothing.pth", "nothing.pth: no such file; expected network weights"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named_with_what_there_is(here, lineage, selector, message):
    with pytest.raises(CheckpointError) as error:
        choose(selector.replace("LINEAGE", lineage), PARAMS)
    assert message in str(error.value)


def test_a_video_is_restored_with_the_latest_checkpoint(here, lineage, tmp_path):
    footage = Footage(Fraction(1, 10), (0, 1, 2, 3), False, Look(2, 0, 2, 2, Fraction(1)))
    write_segment(tmp_path / "in.mkv", np.full((4, 24, 32, 3), 90, np.uint8), footage, 0)
    ended = here.vrt("restore", str(tmp_path / "in.mkv"), "-o", str(tmp_path / "out.mkv"))
    assert ended.returncode == 0 and f"4 frames of {tmp_path}/in.mkv restored with {lineage}@8: {tmp_path}/out.mkv" in ended.stdout, ended.stdout
    assert len(list(video_frames(tmp_path / "out.mkv"))) == 4


@pytest.mark.long
def test_any_checkpoint_is_measured_on_any_test_set_and_the_better_one_is_the_champion(here, lineage, monkeypatch):
    shutil.copytree("data/raw/tiny", "data/raw/other", dirs_exist_ok=True)
    measured = here.vrt("evaluate", "--checkpoint", f"{lineage}@4", "--dataset", "other")
    assert measured.returncode == 0, measured.stdout
    report = json.loads((here.root / f"reports/evaluation-of-{lineage}@4-on-other/metrics.json").read_text())
    # A data set that changed is prepared anew.
    other, clips = here.root / "data/raw/other/dataset.yaml", "data/.prepared-for-evaluation/other/index.json"
    before = (here.root / clips).read_text()
    other.write_text(other.read_text().replace("seed: ", "seed: 1"))
    prepared_test_clips("other", load_params(PARAMS))
    assert (here.root / clips).read_text() != before
    registry = Curator(lineage_named(lineage))
    assert registry.attach()
    client = MlflowClient()
    (shown,) = json.loads(client.get_run(registry.run_id).data.tags["mlflow.loggedArtifacts"])
    assert shown == {"path": "evaluation/step-4-on-other.json", "type": "table"}
    table = json.loads(Path(client.download_artifacts(registry.run_id, shown["path"])).read_text())
    assert table["columns"][:2] == ["clip", "frames"] and len(table["data"]) == 1
    assert float(registry.tags_of(4)["test_other_psnr"]) == pytest.approx(report["psnr"], rel=1e-5)

    assert here.vrt("promote", "--checkpoint", f"{lineage}@1", "--dry-run").returncode == 0
    assert registry.led_to("champion") is None
    first = here.vrt("promote", "--checkpoint", f"{lineage}@1")
    assert first.returncode == 0 and "promoted: there was no champion" in first.stdout, first.stdout
    assert registry.led_to("champion") == (lineage, 1)
    # It outlives what the policy would keep.
    assert registry.registered()[1].champion
    better = here.vrt("promote", "--checkpoint", "best", "--json")
    assert better.returncode == 0, better.stdout
    assert registry.led_to("champion") == registry.led_to("best") != (lineage, 1)
    worse = here.vrt("promote", "--checkpoint", f"{lineage}@1")
    assert worse.returncode == EXIT_NOT_BETTER and "not promoted: its gain is -" in worse.stdout, worse.stdout
    back = here.vrt("promote", "--checkpoint", f"{lineage}@1", "--least-gain", "-100")
    assert back.returncode == 0 and registry.led_to("champion") == (lineage, 1)
    file = here.vrt("promote", "--checkpoint", f"checkpoints/{lineage}/8_G.pth")
    assert file.returncode == EXIT_BAD_INPUT and "only a registered checkpoint can become the champion" in file.stdout


def test_checkpoints_that_are_measured_on_different_clips_are_not_compared(here):
    params = load_params(PARAMS)
    noisier = params.model_copy(update={"degradation": params.degradation.model_copy(update={"sigma_max": 60, "sigma_test": 50.0})})
    check_same_clips("a@1", params, "b@2", params.model_copy(update={"degradation": params.degradation.model_copy(update={"sigma_max": 60})}))
    with pytest.raises(ValueError) as error:
        check_same_clips("a@1", params, "b@2", noisier)
    level = params.degradation.sigma_test
    assert str(error.value) == (
        f'a@1: it restores {{"kind": "noise", "sigma_test": {level}}}, the champion b@2 {{"kind": "noise", "sigma_test": 50.0}}; results on '
        "different clips don't compare: give such a training a `name` of its own, or take the alias "
        "champion away on the model's page in MLflow to begin anew"
    )


@pytest.mark.parametrize(
    "measured, champion, to_beat, least_gain, promoted",
    [
        (30.0, None, None, 0.0, True),
        (30.0, "a@1", 29.0, 0.0, True),
        (30.0, "a@1", 30.0, 0.0, False),
        (30.0, "a@1", 29.95, 0.1, False),
        (30.0, "a@1", 29.9, 0.1, True),
        (30.0, "a@1", 31.0, -2.0, True),
        (30.0, "b@2", 30.0, -2.0, False),
    ],
)
def test_the_gate(measured, champion, to_beat, least_gain, promoted):
    assert judge("b@2", measured, champion, to_beat, "psnr", least_gain).promote is promoted
