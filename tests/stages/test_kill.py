"""The promise: killed at any moment and moved to an empty machine, a training ends as if nothing had happened."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.same_training import assert_same_training


@pytest.mark.long
def test_killed_and_moved_to_an_empty_machine_the_training_ends_bit_identically(make_workspace, uninterrupted):
    workspace = make_workspace("killed")
    seed = time.time_ns()
    print(f"seed of the kill: {seed}")
    trainer = workspace.start("vrt", "train")
    workspace.wait_for("checkpoint 4 registered", trainer)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    trainer.kill()
    assert trainer.wait() == -signal.SIGKILL, "the training ended before the kill: train longer"
    shutil.rmtree(workspace.root / "checkpoints")

    ended = workspace.vrt("train")

    assert ended.returncode == 0, ended.stdout
    assert "(registered)" in ended.stdout, ended.stdout
    assert_same_training(uninterrupted, workspace)


@pytest.mark.long
def test_after_dvc_is_killed_the_next_repro_waits_for_the_orphan_and_continues(make_workspace, uninterrupted):
    workspace = make_workspace("repro")
    dvc = workspace.start("dvc", "repro", "train")
    workspace.wait_for("checkpoint 4 registered", dvc)
    (trainer,) = (child for child in psutil.Process(dvc.pid).children(recursive=True) if "vrt" in child.cmdline())
    assert trainer.is_running()
    os.kill(dvc.pid, signal.SIGKILL)
    dvc.wait()

    ended = workspace.run("dvc", "repro", "train")

    assert ended.returncode == 0, ended.stdout
    assert not trainer.is_running()
    assert_same_training(uninterrupted, workspace)
    again = workspace.run("dvc", "repro", "train")
    assert "didn't change, skipping" in again.stdout, again.stdout


@pytest.mark.long
def test_sigterm_saves_the_step_at_hand_and_asks_to_be_continued(make_workspace, uninterrupted):
    workspace = make_workspace("preempted")
    trainer = workspace.start("vrt", "train")
    workspace.wait_for("checkpoint 4 registered", trainer)
    trainer.terminate()
    assert trainer.wait(60) == 75, workspace.log.read_text()
    assert "received SIGTERM" in workspace.log.read_text()

    ended = workspace.vrt("train")

    assert ended.returncode == 0, ended.stdout
    assert_same_training(uninterrupted, workspace)


@pytest.mark.long
def test_a_compiled_training_killed_and_moved_to_a_machine_without_its_compiled_code_ends_bit_identically(make_workspace, tmp_path):
    undisturbed, killed = make_workspace("compiled"), make_workspace("compiled-killed")
    for workspace in (undisturbed, killed):
        # Blocks of every kind: mutual and self attention, shifted or not, dropped or not.
        workspace.edit(train__compile=True, train__threads=2, network__depths=[4, 1, 1, 1, 1, 1, 4, 2])
    ended = undisturbed.run("vrt", "train")
    assert ended.returncode == 0, ended.stdout
    trainer = killed.start("vrt", "train")
    killed.wait_for("checkpoint 4 registered", trainer)
    trainer.kill()
    assert trainer.wait() == -signal.SIGKILL, "the training ended before the kill: train longer"

    ended = killed.run("vrt", "train", variables={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")})

    assert ended.returncode == 0, ended.stdout
    assert list((tmp_path / "compiled").iterdir()), "nothing was compiled"
    assert_same_training(undisturbed, killed)


def test_told_to_stop_during_a_validation_it_gives_that_up_saves_and_makes_up_for_it(make_workspace):
    workspace = make_workspace("validating")
    # Hundreds of tiles, which take longer than five seconds: then the log tells of them.
    workspace.edit(train__total_steps=8, evaluate__tile=[2, 16, 16], evaluate__overlap=[1, 14, 14])
    trainer = workspace.train_with("vrt.lifecycle", "SECONDS_TO_WIND_UP", 0.0)
    workspace.wait_for("evaluate val", trainer)
    trainer.terminate()
    assert trainer.wait(60) == 75, workspace.log.read_text()
    told = workspace.log.read_text()
    assert "step 4: its validation is given up" in told and "checkpoint 4 registered" in told, told

    workspace.edit(evaluate__tile=[3, 40, 40], evaluate__overlap=[1, 8, 8])
    ended = workspace.vrt("train")

    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.index("continuing after step 4") < ended.stdout.index("step 4: validation"), ended.stdout


def test_a_trainer_whose_launcher_died_saves_and_ends(make_workspace):
    workspace = make_workspace("orphan")
    workspace.edit(train__total_steps=100_000)
    with workspace.log.open("w") as output:
        command = ["bash", "-c", f"{sys.executable} -m vrt train; true"]
        launcher = subprocess.Popen(command, cwd=workspace.root, env=workspace.environment, stdout=output, stderr=subprocess.STDOUT)
    workspace.wait_for("checkpoint 4 registered", launcher)
    (trainer,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()

    psutil.wait_procs([trainer], timeout=60)

    assert not trainer.is_running()
    said = workspace.log.read_text()
    assert f"process {launcher.pid}, which launched this one, is gone" in said
    step = int(re.search(r"stopping after step (\d+)", said)[1])
    assert f"checkpoint {step} registered" in said


def test_a_second_trainer_is_refused_and_told_who_trains(make_workspace):
    workspace = make_workspace("two")
    workspace.edit(train__total_steps=100_000)
    first = workspace.start("vrt", "train")
    workspace.wait_for("starting at step 1", first)

    second = workspace.vrt("train")

    assert second.returncode == 1
    assert f"process {first.pid} has been training here since" in second.stdout
    assert "one trainer at a time" in second.stdout
    assert "Traceback" not in second.stdout
    first.terminate()
    assert first.wait(60) == 75
