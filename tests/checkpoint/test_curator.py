"""Looking after what is registered, against a real server: pins, holds, deletions."""

import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vrt.checkpoint import registry as registry_module
from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.tracking import Lineage


@pytest.fixture
def curator(services, tmp_path: Path, folder, commit) -> Curator:
    """Of a lineage of the test's own, with steps 20, 40 and 60 registered."""
    made = Curator(Lineage(f"{tmp_path.name}-{os.getpid()}", "0123456789abcdef", {"seed": 1}))
    made.open({"seed": 1}, {})
    for step in (20, 40, 60):
        made.register(commit(folder, step, lineage=made.lineage.id), f"s3://mlflow/x/{step:08d}", folder.path)
    return made


def test_what_is_pinned_or_held_shows_to_everybody_until_it_is_over(curator):
    other = Curator(lineage_named(curator.lineage.id))
    curator.pin(40, True)
    with curator.hold(20):
        assert [(one.step, one.pinned, one.held) for one in other.registered().values()] == [(60, False, False), (40, True, False), (20, False, True)]
    curator.pin(40, False)
    curator.pin(40, False)
    assert not any(one.pinned or one.held for one in other.registered().values())


def test_the_latest_is_the_newest_step_whenever_it_was_registered(curator, commit, folder):
    assert curator.latest().step == 60
    # As a repair does.
    curator.register(commit(folder, 50, lineage=curator.lineage.id), "s3://mlflow/x/00000050", folder.path)
    assert curator.latest() == curator.registered()[60]
    assert Curator(Lineage("nobody", "0" * 16, {})).latest() is None


def test_a_hold_whose_owner_was_killed_expires(curator, monkeypatch):
    with curator.hold(20):
        monkeypatch.setattr(registry_module, "LONGEST_HOLD", registry_module.LONGEST_HOLD * 0)
        assert not curator.registered()[20].held


def test_deleting_the_newest_lets_the_alias_point_to_the_one_before(curator):
    client = MlflowClient()
    curator.unregister(60)
    assert client.get_model_version_by_alias(curator.lineage.model, "latest-step").tags["step"] == "40"
    assert list(curator.registered()) == [40, 20]
    for step in (40, 20):
        curator.unregister(step)
    assert curator.registered() == {}
    with pytest.raises(CheckpointError, match=f"{curator.lineage.id} step 60 is not registered; `vrt checkpoints list` shows what is"):
        curator.unregister(60)


def test_the_aliases_lead_to_the_newest_and_the_best_that_are_left_and_the_champion_is_known(curator, commit, folder):
    client = MlflowClient()
    model = curator.lineage.model

    def led_to() -> dict[str, str]:
        versions = {version.version: version.tags["step"] for version in client.search_model_versions(f"name = '{model}'")}
        return {alias: versions[version] for alias, version in client.get_registered_model(model).aliases.items()}

    assert led_to() == {"latest-step": "60"}, "nothing was validated"
    for step, psnr in ((80, 31.0), (100, 32.5), (120, 32.5), (140, 30.0)):
        curator.register(commit(folder, step, lineage=curator.lineage.id, metrics={"val/psnr": psnr}), f"s3://mlflow/x/{step:08d}", folder.path)
    assert led_to() == {"latest-step": "140", "best": "100"}
    client.set_registered_model_alias(model, "champion", client.get_model_version_by_alias(model, "best").version)
    assert [one.step for one in curator.registered().values() if one.champion] == [100]
    with pytest.raises(CheckpointError, match=r"step 100 is the champion: promote another one first \(`vrt promote`\)"):
        curator.unregister(100)
    client.delete_registered_model_alias(model, "champion")
    for step in (140, 100, 120):
        curator.unregister(step)
    assert led_to() == {"latest-step": "80", "best": "80"}
    curator.unregister(80)
    assert led_to() == {"latest-step": "60"}


def test_a_step_that_was_validated_late_says_so_and_can_be_the_best(curator, commit, folder):
    for step, metrics in ((80, {"val/psnr": 31.0}), (100, {}), (120, {})):
        curator.register(commit(folder, step, lineage=curator.lineage.id, metrics=metrics), f"s3://mlflow/x/{step:08d}", folder.path)
    curator.score({80: {"val/psnr": 99.0}, 100: {"val/psnr": 32.5, "val/ssim": 0.875}, 110: {"val/psnr": 99.0}})
    assert {step: one.psnr for step, one in curator.registered().items() if step >= 80} == {80: 31.0, 100: 32.5, 120: None}
    assert curator.tags_of(100)["val_ssim"] == "0.875"
    assert curator.led_to("best") == (curator.lineage.id, 100)


def test_a_run_that_nobody_trains_any_more_is_marked_killed_once(curator):
    client = MlflowClient()
    assert not curator.settle(lambda: False)
    assert client.get_run(curator.run_id).info.status == "RUNNING"
    assert curator.settle(lambda: True)
    assert client.get_run(curator.run_id).info.status == "KILLED"
    curator.close("FINISHED")
    assert not curator.settle(lambda: True)
    assert client.get_run(curator.run_id).info.status == "FINISHED"


def test_a_note_reads_back_and_lineages_are_found_by_name(curator):
    assert curator.noted("began") == ""
    curator.note("began", "2000")
    assert curator.noted("began") == "2000"
    assert curator.lineage.id in curator.lineages()
    assert lineage_named(curator.lineage.id).model == curator.lineage.model
