"""The loop: interrupted anywhere, it ends where the uninterrupted one does, to the last bit."""

import pytest
import torch
from torch import Tensor, nn

from tests.training.conftest import validate
from vrt.checkpoint.errors import SavesFail
from vrt.checkpoint.folder import CheckpointFolder
from vrt.data.sampler import Batch
from vrt.lifecycle import ToldToStop
from vrt.training import loop
from vrt.training.session import build_network


def equal(one: object, other: object) -> bool:
    """Whether two trees hold the same keys, values and bits."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture
def whole(params, fresh, attempt, tmp_path):
    """The training without any interruption."""
    return attempt(params, tmp_path / "whole", fresh())


def test_a_resumed_training_has_the_state_of_an_uninterrupted_one(params, fresh, attempt, tmp_path, whole):
    # Killed after step 3 was saved: a new process knows only what is on disk.
    half = params.model_copy(update={"train": params.train.model_copy(update={"total_steps": 3})})
    assert attempt(half, tmp_path / "parts", fresh()).done
    torch.manual_seed(99)
    resumed = attempt(params, tmp_path / "parts", fresh())
    assert resumed.registered.steps == [6]
    for part in ("network", "ema", "optimizer"):
        assert equal(getattr(resumed.state, part).state_dict(), getattr(whole.state, part).state_dict()), part
    assert resumed.state.step == whole.state.step == 6


# By preemption, which may come at any step, not only where a checkpoint or a validation is due.
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6])
def test_a_stopped_and_resumed_training_writes_the_same_files(params, fresh, attempt, tmp_path, whole, stop_at: int):
    first = attempt(params, tmp_path / "parts", fresh(), first_to_stop=stop_at)
    assert first.folder.steps()[0] == stop_at
    resumed = attempt(params, tmp_path / "parts", fresh())
    assert resumed.done
    found, expected = resumed.files(6), whole.files(6)
    assert found.keys() == expected.keys()
    assert found["6_history.jsonl"].decode() == expected["6_history.jsonl"].decode()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert resumed.folder.manifest(6).digest == whole.folder.manifest(6).digest


def test_what_happens_at_which_step(params, fresh, attempt, tmp_path, whole):
    assert whole.done
    assert whole.folder.steps() == [6, 3, 1]
    assert whole.registered.steps == [1, 3, 6]
    assert set(whole.files(6)) == {"6_G.pth", "6_E.pth", "6_optimizerG.pth", "6_history.jsonl", "6_preview.png"}
    rows = whole.state.history.rows
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 6]
    assert [row["step"] for row in rows if "val/psnr" in row] == [2, 3, 4, 6]
    assert [row["step"] for row in whole.registered.rows if "train/steps_per_s" in row] == [1, 2, 3, 4, 6]
    for timing in ("blocked_s", "waited_s", "committed_s", "registered_s"):
        assert [row["step"] for row in whole.registered.rows if f"save/{timing}" in row] == [1, 3, 6]
    # Speed and times are no functions of the step: in the history they would make each run another.
    assert {key for row in rows for key in row} == {"step", "train/loss", "train/lr", "val/psnr"}


def test_a_stop_request_ends_after_the_step_with_a_save_and_without_a_validation(params, fresh, attempt, tmp_path):
    stopped = attempt(params, tmp_path / "parts", fresh(), first_to_stop=4)
    assert not stopped.done
    assert stopped.state.step == 4
    assert stopped.folder.steps() == [4, 3, 1]
    assert stopped.registered.steps == [1, 3, 4]
    assert stopped.missing == []
    assert [row["step"] for row in stopped.state.history.rows if "val/psnr" in row] == [2, 3]
    assert set(stopped.files(4)) == {"4_G.pth", "4_E.pth", "4_optimizerG.pth", "4_history.jsonl"}


@pytest.mark.parametrize("stop_at", [2, 3, 4, 6])
def test_told_to_stop_during_a_validation_it_gives_that_up_and_saves(params, fresh, attempt, tmp_path, whole, stop_at: int):
    state = fresh()

    def told_meanwhile(network: nn.Module) -> loop.Validation:
        if state.step == stop_at:
            raise ToldToStop("received SIGTERM")
        return validate(network)

    stopped = attempt(params, tmp_path / "parts", state, validate=told_meanwhile)
    assert not stopped.done and stopped.folder.steps()[0] == stop_at
    assert not state.history.has(stop_at, "val/psnr")
    # Told once more while it makes up for it: no step may go by meanwhile, or nobody would.
    state = fresh()
    again = attempt(params, tmp_path / "parts", state, validate=told_meanwhile)
    assert not again.done and state.step == stop_at

    resumed = attempt(params, tmp_path / "parts", fresh())

    assert resumed.done
    assert resumed.state.history.rows == whole.state.history.rows
    assert equal(resumed.state.network.state_dict(), whole.state.network.state_dict())
    assert stop_at == 6 or resumed.files(6) == whole.files(6)


class FailsAt(nn.Module):
    """One number whose loss, or whose gradient alone, is no number any more from a step on."""

    def __init__(self, step: int, what: str):
        super().__init__()
        self.flow, self.body = nn.Linear(1, 1), nn.Linear(1, 1)
        self._step, self._what, self._calls = step, what, 0

    def forward(self, clip: Tensor) -> Tensor:
        self._calls += self.training
        x = clip + self.body.weight + self.flow.weight
        if self.training and self._calls >= self._step:
            if self._what == "loss":
                return x * float("nan")
            x.register_hook(lambda gradient: gradient * float("nan"))
        return x


@pytest.mark.parametrize("step", [4, 6])
def test_a_loss_that_is_no_number_ends_the_training_and_is_not_saved(params, fresh, attempt, tmp_path, step: int):
    told = f"step {step}: the loss is nan; nothing of this step was saved, the last healthy checkpoint is step 3: lower optimizer.lr"
    with pytest.raises(FloatingPointError, match=told):
        attempt(params, tmp_path / "parts", fresh(lambda: FailsAt(step, "loss")))
    assert CheckpointFolder(tmp_path / "parts").steps() == [3, 1]


def test_a_loss_that_is_no_number_between_two_points_of_the_curve_is_never_saved(params, fresh, attempt, tmp_path):
    # At step 5 nobody looks; step 6 is the next that would be saved.
    with pytest.raises(FloatingPointError, match="step 6: the loss is nan"):
        attempt(params, tmp_path / "parts", fresh(lambda: FailsAt(5, "loss")))
    assert CheckpointFolder(tmp_path / "parts").steps() == [3, 1]


def test_weights_that_are_no_numbers_are_not_saved(params, fresh, attempt, tmp_path):
    # The loss of a step is that of the weights before it. A gradient that overflows spoils the weights without showing in it, and every
    # training resumed from such a checkpoint would fail at its first step.
    told = "step 3: G.pth flow.weight holds values that are no numbers; nothing of this step was saved, the last healthy checkpoint is step 1"
    with pytest.raises(FloatingPointError, match=told):
        attempt(params, tmp_path / "parts", fresh(lambda: FailsAt(3, "gradient")))
    assert CheckpointFolder(tmp_path / "parts").steps() == [1]


def test_flows_that_are_no_numbers_are_told_by_the_loss_and_never_saved(params, fresh, attempt, tmp_path, batch_of, monkeypatch):
    # One spoiled sample at step 5, where nobody looks, spoils all weights: step 6 moves its frames by flows that are no numbers.
    def batches(step: int) -> Batch:
        batch = batch_of(step)
        return Batch(batch.degraded, batch.truth * float("nan")) if step == 5 else batch

    monkeypatch.setattr("tests.training.conftest.make_batch", batches)
    sizes = {"depths": (1,) * 8, "embed_dims": (8,) * 8, "num_heads": (2,) * 8, "indep_reconsts": ()}
    network = params.network.model_copy(update={"window_size": (2, 4, 4), "deformable_groups": 2} | sizes)
    flow = params.optimizer.model_copy(update={"flow_names": ("spynet", "deform")})
    params = params.model_copy(update={"network": network, "optimizer": flow})
    with pytest.raises(FloatingPointError, match="step 6: the loss is nan; nothing of this step was saved, the last healthy checkpoint is step 3"):
        attempt(params, tmp_path / "parts", fresh(lambda: build_network(network), params))
    assert CheckpointFolder(tmp_path / "parts").steps() == [3, 1]


def test_steps_are_saved_when_their_validation_fails(params, fresh, attempt, tmp_path):
    def out_of_memory(network):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        attempt(params, tmp_path / "parts", fresh(), validate=out_of_memory)
    # Validation comes first at step 2; the next attempt begins with validating it.
    resumed = attempt(params, tmp_path / "parts", fresh())
    assert resumed.folder.steps() == [6, 3, 2, 1]
    assert [row["step"] for row in resumed.state.history.rows if "val/psnr" in row] == [2, 3, 4, 6]


@pytest.mark.parametrize("failing, error", [(3, OSError(5, "Input/output error")), (5, KeyboardInterrupt()), (6, RuntimeError("CUDA out of memory"))])
def test_the_newest_whole_step_is_saved_before_an_error_ends_the_training(params, fresh, attempt, tmp_path, whole, monkeypatch, error, failing):
    forward = type(whole.state.network).forward
    calls = []

    def fail_once(network, clip):
        calls.append(network.training)
        if sum(calls) == failing:
            raise error
        return forward(network, clip)

    stopped = attempt(params, tmp_path / "stopped", fresh(), first_to_stop=failing - 1)
    monkeypatch.setattr(type(whole.state.network), "forward", fail_once)
    with pytest.raises(type(error)):
        attempt(params, tmp_path / "parts", fresh())
    assert CheckpointFolder(tmp_path / "parts").steps()[0] == failing - 1
    for name in ("G.pth", "E.pth", "optimizerG.pth"):
        # The step that failed had set its own learning rate: no trace of it.
        assert (tmp_path / "parts" / f"{failing - 1}_{name}").read_bytes() == stopped.files(failing - 1)[f"{failing - 1}_{name}"]
    resumed = attempt(params, tmp_path / "parts", fresh())
    found, expected = resumed.files(6), whole.files(6)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_step_that_was_interrupted_while_it_changed_the_weights_is_not_saved(params, fresh, attempt, tmp_path, whole, monkeypatch, caplog):
    update = loop.update_ema

    def interrupt(ema, network, decay):
        if fails:
            raise KeyboardInterrupt
        update(ema, network, decay)

    fails = False

    def validate_and_arm(network):
        nonlocal fails
        # After the validation of step 4, the next step moves the weights and not their average.
        fails = len(validated) == 2
        validated.append(network)
        return whole.measure(network)

    validated: list = []
    monkeypatch.setattr(loop, "update_ema", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attempt(params, tmp_path / "parts", fresh(), validate=validate_and_arm)
    assert CheckpointFolder(tmp_path / "parts").steps() == [3, 1]
    assert "KeyboardInterrupt interrupted a step while it changed the weights: nothing after the last save is kept" in caplog.text


def test_a_training_whose_saves_fail_stops_when_the_params_say_so(params, fresh, attempt, tmp_path):
    strict = params.model_copy(update={"checkpoints": params.checkpoints.model_copy(update={"most_failed_saves": 1})})
    (tmp_path / "parts" / "3_G.pth").mkdir(parents=True)
    with pytest.raises(SavesFail, match="step 3 could not be saved .*; then start again: saves failed one after another: 1 .*; step 1 is safe"):
        attempt(strict, tmp_path / "parts", fresh())
