"""What a person reads when something is wrong, and what recovers by itself."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_UNAVAILABLE


def test_broken_params_name_the_key_what_was_found_and_what_is_allowed(make_workspace):
    workspace = make_workspace("params")
    workspace.edit(optimizer__lr=-1.0)
    ended = workspace.vrt("train")
    assert ended.returncode == EXIT_BAD_INPUT
    assert "params.yaml: 1 wrong value" in ended.stdout
    assert "optimizer.lr: found -1.0; input should be greater than 0" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert not (workspace.root / "checkpoints").exists()


def test_a_missing_data_set_says_how_to_make_it(make_workspace):
    workspace = make_workspace("data")
    shutil.rmtree(workspace.root / "data/prepared")
    ended = workspace.vrt("train")
    assert ended.returncode == EXIT_BAD_INPUT
    assert "data/prepared" in ended.stdout and "dvc repro prepare" in ended.stdout
    assert "Traceback" not in ended.stdout


def test_services_that_are_down_are_named_at_the_start(make_workspace):
    workspace = make_workspace("down")
    ended = workspace.vrt("train", variables={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert ended.returncode == EXIT_UNAVAILABLE
    assert re.search(r"MLflow at http://127.0.0.1:9 does not answer \(.*Connection refused", ended.stdout), ended.stdout
    assert "vrt services status" in ended.stdout
    assert "Traceback" not in ended.stdout


def test_a_training_that_is_done_while_the_store_is_gone_asks_to_be_started_again_and_is_registered_then(make_workspace, local_services):
    workspace = make_workspace("gone")
    port = str(urlsplit(local_services.environment["AWS_ENDPOINT_URL"]).port)
    through_relay = {name: f"http://127.0.0.2:{port}" for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")}
    relay = subprocess.Popen([sys.executable, Path(__file__).with_name("relay.py"), "127.0.0.2", "127.0.0.1", port])
    trainer = workspace.train_with("vrt.stages.train", "SECONDS_TO_PUBLISH", 3.0, through_relay)
    try:
        workspace.wait_for("checkpoint 4 registered", trainer)
        relay.kill()
        assert trainer.wait(120) == EXIT_UNAVAILABLE, workspace.log.read_text()
    finally:
        for process in (relay, trainer):
            process.kill()
            process.wait()
    told = workspace.log.read_text()
    assert re.search("not registered: step 24: .*the store does not answer", told) and "run the same command again to register" in told, told

    again = workspace.vrt("train")

    assert again.returncode == 0 and "checkpoint 24 registered" in again.stdout, again.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is made by mounting a small one, which only root may")
def test_a_full_outbox_folder_is_shown_loudly_and_nothing_saved_before_is_lost(make_workspace):
    workspace = make_workspace("full")
    workspace.edit(train__total_steps=8)
    (workspace.root / "checkpoints").mkdir()
    script = "mount -t tmpfs -o size=33m tmpfs checkpoints && python -m vrt train; code=$?; ls checkpoints/*/8_*; exit $code"
    command = ["unshare", "--mount", "sh", "-c", script]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run(command, check=False, cwd=workspace.root, env=workspace.environment, timeout=120, **output)
    assert ended.returncode == EXIT_FAILED, ended.stdout
    assert "SAVE FAILED, training goes on" in ended.stdout and "(No space left on device); free space there" in ended.stdout
    assert "the state after step 8 is not saved" in ended.stdout
    assert "checkpoint 4 registered" in ended.stdout
    assert "cannot access 'checkpoints/*/8_*'" in ended.stdout, "the step that failed leaves nothing behind"

    recovered = workspace.vrt("train")

    assert recovered.returncode == 0, recovered.stdout
    assert "continuing after step 4 of 8 (registered)" in recovered.stdout


@pytest.mark.long
def test_a_truncated_checkpoint_is_set_aside_and_fetched_again(make_workspace):
    workspace = make_workspace("truncated")
    workspace.edit(train__total_steps=4)
    assert workspace.vrt("train").returncode == 0
    (weights,) = (workspace.root / "checkpoints").glob("*/4_G.pth")
    intact = weights.read_bytes()
    weights.write_bytes(intact[:1000])

    ended = workspace.vrt("train")

    assert ended.returncode == 0, ended.stdout
    assert f"4_G.pth has 1000 bytes; the manifest says {len(intact)}" in ended.stdout
    assert "fetched registered checkpoint 4" in ended.stdout
    assert weights.read_bytes() == intact
    assert (weights.parent / "damaged/4-1/4_G.pth").stat().st_size == 1000


@pytest.fixture
def changed(make_workspace):
    """A workspace that trained four steps and whose params are another training's since; and the lineage of those steps."""
    workspace = make_workspace("changed")
    workspace.edit(train__total_steps=4)
    assert workspace.vrt("train").returncode == 0
    (first,) = (path.name for path in (workspace.root / "checkpoints").iterdir() if path.is_dir())
    workspace.edit(optimizer__lr=0.002, train__total_steps=5)
    return workspace, first


def test_changed_params_are_no_silent_new_start(changed):
    workspace, first = changed

    refused = workspace.vrt("train")

    assert refused.returncode == EXIT_BAD_INPUT, refused.stdout
    told = (
        f"with these params it is another training than {first}, which has checkpoints up to step 4; changed since:\n  optimizer.lr: 0.003 -> 0.002\n"
    )
    assert told in refused.stdout and f'`vrt train --resume "fork {first}@4"`' in refused.stdout
    assert "data.digest" not in refused.stdout and "Traceback" not in refused.stdout
    assert [path.name for path in (workspace.root / "checkpoints").iterdir() if path.is_dir()] == [first], "refused before anything is made"


@pytest.mark.long
def test_after_a_change_each_way_on_works(changed):
    workspace, first = changed
    other = workspace.vrt("train", "--resume", "never")
    assert other.returncode == 0, other.stdout
    assert f"this is a new training, {first} is not continued; changed since: optimizer.lr: 0.003 -> 0.002" in other.stdout
    assert "starting at step 1 of 5" in other.stdout
    # It exists now, and is continued without being asked again.
    workspace.edit(train__total_steps=6)
    assert "continuing after step 5 of 6" in workspace.vrt("train").stdout

    workspace.edit(optimizer__lr=0.003)
    back = workspace.vrt("train")
    assert back.returncode == 0 and "continuing after step 4 of 6" in back.stdout, back.stdout


def test_more_steps_continue_the_same_lineage(make_workspace):
    workspace = make_workspace("longer")
    workspace.edit(train__total_steps=4)
    assert workspace.vrt("train").returncode == 0
    workspace.edit(train__total_steps=6)
    ended = workspace.vrt("train")
    assert ended.returncode == 0, ended.stdout
    assert "continuing after step 4 of 6" in ended.stdout
