"""What `vrt doctor` says of memory and disk is what a training really keeps there."""

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from vrt.params import Params, load_params
from vrt.stages import room
from vrt.stages.recipes import find_recipe
from vrt.stages.room import Memory, checkpoint_bytes, clip_bytes, judged_memory, state_bytes
from vrt.training.session import build_state

GB = 10**9
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def params(make_project, monkeypatch) -> Params:
    monkeypatch.chdir(make_project("room").root)
    return load_params(Path("params.yaml"))


def with_train(params: Params, **values: object) -> Params:
    return params.model_copy(update={"train": params.train.model_copy(update=values)})


def test_bytes_are_those_of_a_state_after_a_step(params):
    for decay in (0.95, 0):
        few = with_train(params, ema_decay=decay)
        state = build_state(few, torch.device("cpu"))
        for parameter in state.network.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        networks = [state.network, state.ema] if decay else [state.network]
        kept = [value for network in networks for value in network.state_dict().values()]
        kept += [moments[name] for moments in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        gradients = [parameter.grad for parameter in state.network.parameters()]
        assert checkpoint_bytes(few) == sum(value.nbytes for value in kept)
        assert state_bytes(few) == sum(value.nbytes for value in kept + gradients)


def test_a_training_that_the_memory_can_never_hold_is_told_from_one_that_has_to_wait(params):
    needed = state_bytes(params)
    for free, total, state in ((needed, needed, "warning"), (needed - 1, needed, "unavailable"), (needed - 1, needed - 1, "wrong")):
        assert judged_memory(params, Memory(free, total, 0, 1, 4)).state == state
    assert judged_memory(params, Memory(2 * needed, 2 * needed, None, 2, 4)).state == "ok"
    assert judged_memory(params, Memory(2 * needed - 1, 2 * needed, None, 2, 4)).state == "unavailable"
    assert judged_memory(params, Memory(2 * needed - 1, 2 * needed - 1, None, 2, 4)).remedy.startswith("fewer train.processes, ")


@pytest.mark.parametrize("number, row", [("001", "001 train"), ("006", "006 train, checkpointed")])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_what_a_clip_takes_of_a_gpu_is_about_what_was_measured(number, row, precision):
    measured = json.loads((PROJECT / "benchmarks/results/network-nvidia-h100-80gb-hbm3-16-cores.json").read_text())["measured"]
    peak = 2**20 * measured[row if precision == "fp32" else f"{row}, {precision}"]["peak_MB"]
    params = load_params(find_recipe(number))
    # What was measured keeps no average.
    clip = with_train(params, precision=precision, activation_checkpointing="checkpointed" in row, ema_decay=0)
    assert clip_bytes(clip) + state_bytes(clip) == pytest.approx(peak, rel=0.05)


def test_what_clips_take_is_said_with_who_knows_better(params):
    takes = f"weights, gradients, moments and E take {state_bytes(params) / 1e9:.2f} GB"
    tried = judged_memory(params, Memory(79 * GB, 85 * GB, 1, 1, 4))
    clip = f"{clip_bytes(params) / 1e9:.1f}"
    assert tried.found == f"79.0 of 85.0 GB of GPU 1 are free; {takes}, and each clip at once about {clip} GB; the start tries how many fit"
    assert (tried.state, tried.remedy) == ("ok", "should not even one fit: train.activation_checkpointing: true")
    alike = judged_memory(with_train(params, deterministic=True), Memory(79 * GB, 85 * GB, 1, 1, 4))
    assert alike.found.endswith(f"each clip at once about {clip} GB"), "it is always one"
    machine = judged_memory(params, Memory(79 * GB, 85 * GB, None, 1, 4))
    assert machine.found == f"79.0 of 85.0 GB of the machine are free; {takes}; what clips take on top, the first step tells"
    assert (machine.state, machine.remedy) == ("ok", "should it be too much: lower train.clips_at_once")


def test_a_gpu_that_seems_too_small_for_the_clips_is_warned_of(params):
    one = state_bytes(params) + clip_bytes(params)
    for total, state in ((one, "ok"), (one - 1, "warning")):
        assert judged_memory(params, Memory(total, total, 0, 1, 4)).state == state
    few = judged_memory(with_train(params, clips_at_once=2), Memory(one, one, 0, 1, 4))
    assert few.state == "warning" and few.found.endswith("GB, which is more than there is")
    assert few.remedy == "lower train.clips_at_once, or set it to auto"
    assert judged_memory(with_train(params, clips_at_once=2), Memory(one, one, 0, 1, 1)).state == "ok", "a process has one clip of each batch"
    again = with_train(params, activation_checkpointing=True)
    assert clip_bytes(again) < clip_bytes(params)
    tiny = judged_memory(again, Memory(state_bytes(again), state_bytes(again), 0, 1, 4))
    assert (tiny.state, tiny.remedy) == ("warning", "should not even one fit: lower train.crop or train.frames")


def test_the_fullest_gpu_that_would_train_counts(params, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: ((70 - 10 * gpu) * GB, 80 * GB))
    assert "60.0 of 80.0 GB of GPU 1" in room.memory(params, 2, 1).found
    assert "50.0 of 80.0 GB of GPU 2" in room.memory(params, 3, 1).found


def test_without_a_gpu_the_memory_of_the_machine_counts(params, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "of the machine are free" in room.memory(params, 1, 1).found
    assert "moments and E of 3 processes take" in room.memory(params, 3, 1).found


def test_in_a_container_its_limit_counts_and_cached_files_are_free(params, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(room, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: namedtuple("whole", "available total")(60 * GB, 64 * GB))
    for most, free, total in (("max", 60, 64), (8 * GB, 5, 8), (80 * GB, 60, 64)):
        for name, text in (("max", most), ("current", 4 * GB), ("stat", f"anon {3 * GB}\ninactive_file {GB}\nactive_file 0\n")):
            (tmp_path / f"memory.{name}").write_text(f"{text}\n")
        assert room.memory(params, 1, 1).found.startswith(f"{free}.0 of {total}.0 GB of the machine are free")


def test_a_disk_too_small_for_the_checkpoints_is_told(params, monkeypatch):
    needed = checkpoint_bytes(params) * 6
    for free, state in ((needed, "ok"), (needed - 1, "wrong")):
        usage = namedtuple("usage", "total used free")(10**12, 0, free)
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert room.disk(params).state == state
