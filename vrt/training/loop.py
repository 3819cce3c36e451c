"""THE loop. It trains, validates and hands over snapshots; when and where they are kept is not its business."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import nn

from vrt.checkpoint.phases import Phase, reached
from vrt.checkpoint.saver import unharmed
from vrt.data.sampler import Batch
from vrt.distributed import ALONE, Team
from vrt.lifecycle import StopRequest, ToldToStop
from vrt.model.block import place_in_batch
from vrt.observe import log, progress
from vrt.params import Params, Train
from vrt.training.ema import update_ema
from vrt.training.history import VALIDATION, History, Row
from vrt.training.optim import charbonnier, set_schedule

# Keeps the draws of a training step apart from other draws of the same seed.
STEP_STREAM = 7_001


@dataclass
class TrainingState:
    """All that the next step needs; the rest is a function of (seed, step)."""

    network: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Adam
    history: History
    step: int
    """Steps done."""
    agrees: bool = True
    """False while a step is being entered: weights, average, optimizer, history and step number are then not of one step."""

    @property
    def released(self) -> nn.Module:
        """The network that users get, and validation measures: E where it is kept, else G."""
        return self.ema or self.network


@dataclass(frozen=True)
class Validation:
    """How good the network is on the validation clips, in numbers and to look at."""

    metrics: dict[str, float]
    """Such as {"psnr": 31.2, "ssim": 0.91}."""
    preview: bytes
    """PNG: input | restored | truth."""


class Checkpoints(Protocol):
    """Where snapshots and metrics go. `save` waits for the copy of the state alone, `send` and `check` for nothing."""

    def save(self, state: TrainingState, preview: bytes | None) -> None:
        """Take a copy of the state, to be written behind the training; `preview` is a PNG."""

    def send(self, row: Row) -> None:
        """Log the metrics of a step, which is under "step"."""

    def check(self) -> None:
        """Raises what was found behind the training that must stop it: values that are no numbers, saves that fail, another trainer."""

    def safe_step(self) -> int:
        """The newest step that is saved, once what is being written is; 0: none."""


def train(
    params: Params,
    state: TrainingState,
    batches: Iterable[tuple[int, Batch]],
    checkpoints: Checkpoints,
    validate: Callable[[nn.Module], Validation],
    stop: StopRequest,
    team: Team = ALONE,
    at_once: int | None = None,
) -> bool:
    """Train from `state.step` to `params.train.total_steps`. True: done. False: stopped early on request, with everything saved.

    `batches` yields (step, this process's share of the batch) for each step to do; `at_once` of its clips, or all, go through the network
    together. Only the process that leads the team validates; `validate` may raise ToldToStop, which makes of it a request to stop. An error,
    wherever it comes from, leaves only after the newest whole step was saved; but FloatingPointError, raised where loss or weights are no
    numbers any more, leaves nothing of what they spoiled.
    """
    plan = params.train
    saved = state.step
    with progress("train", plan.total_steps, "steps", done=state.step) as bar:
        # The attempt before may have been stopped at this step, without the time to validate it.
        owed = team.leads and state.step > 0 and due(plan, state.step).validate and not state.history.has(state.step, "val/psnr")
        if team.any(owed and validate_step(state, checkpoints, validate) is None):
            return False
        speed, shown, skipped = Speed(state.step), {}, 0
        try:
            for step, batch in batches:
                loss, lr = take_step(params, state, step, batch, team, at_once)
                reached(Phase.STEP)
                now = due(plan, step)
                told_to_stop, skipped_now = team.total(stop.reason is not None, len(batch.skipped))
                skipped = report_skipped(checkpoints, step, batch, skipped, int(skipped_now))
                stopping = step < plan.total_steps and told_to_stop > 0
                shown = enter(state, checkpoints, loss, lr, speed, now, stopping) or shown
                preview = None
                if now.validate and not stopping:
                    preview = validate_step(state, checkpoints, validate) if team.leads else None
                    given_up = team.leads and preview is None
                    # A validation takes its time: who was told to stop meanwhile does not begin another step.
                    stopping = team.any(given_up or (step < plan.total_steps and stop.reason is not None))
                if now.save or stopping:
                    checkpoints.save(state, preview)
                    saved = step
                if now.validate or now.save:
                    speed.restart(step)
                bar.advance(1, **shown)
                if stopping:
                    log.warning("stopping after step %d: %s", step, stop.reason or "another process of this training was told to")
                    return False
                checkpoints.check()
        except FloatingPointError:
            raise
        except BaseException as error:
            if state.step > saved or not state.agrees:
                save_what_is_whole(params, state, checkpoints, error)
            raise
    return True


def report_skipped(checkpoints: Checkpoints, step: int, batch: Batch, before: int, now: int) -> int:
    """Say which clips this process could not read (`data.damaged: skip`), and how many all have met. Returns their number in this attempt."""
    for reason in batch.skipped:
        log.warning("skipped: %s", reason)
    if now:
        checkpoints.send({"step": step, "data/skipped": before + now})
    return before + now


def enter(
    state: TrainingState, checkpoints: Checkpoints, loss: torch.Tensor, lr: float, speed: "Speed", now: "Due", stopping: bool
) -> dict[str, str]:
    """Enter a step that was taken into the history, where it is due. Returns what to show of it."""
    shown = {}
    # Only here is the loss fetched: on a GPU that waits for the step to end.
    if now.log or stopping:
        value = check_loss(state.step, loss.item(), checkpoints)
        if now.log:
            rate = speed.at(state.step)
            checkpoints.send(state.history.add(state.step, {"train/loss": value, "train/lr": lr}) | {"train/steps_per_s": rate})
            shown = {"loss": f"{value:.4f}", "lr": f"{lr:.2e}", "steps/s": f"{rate:.2f}"}
    state.agrees = True
    return shown


def save_what_is_whole(params: Params, state: TrainingState, checkpoints: Checkpoints, error: BaseException) -> None:
    """Save the newest step before `error` ends the training, unless it came in the middle of entering one."""
    if not state.agrees:
        log.error("%s interrupted a step while it changed the weights: nothing after the last save is kept", type(error).__name__)
        return
    # The step that failed has set its own learning rate already.
    set_schedule(state.optimizer, params.optimizer, state.step)
    log.warning("%s ends the training; step %d is saved first", type(error).__name__, state.step)
    try:
        checkpoints.save(state, None)
    except Exception:
        log.exception("step %d can't be saved", state.step)


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    validate: bool
    save: bool


def due(plan: Train, step: int) -> Due:
    """What to do after a step: a function of the step, so that the history does not show where a training was interrupted.

    Every checkpoint that is due is logged and validated too, so that each says how good it is; but the one after the first step, which is
    there to prove within a minute, not after hours, that the way to the registry is open, does not wait for a validation.
    """
    save = step == plan.total_steps or step % plan.checkpoint_every == 0
    validate = save or step % plan.validate_every == 0
    return Due(log=save or step == 1 or step % plan.log_every == 0, validate=validate, save=save or step == 1)


def validate_step(state: TrainingState, checkpoints: Checkpoints, validate: Callable[[nn.Module], Validation]) -> bytes | None:
    """Validate the released network, enter the result into the history, and return the preview; None: told to stop, it was given up."""
    try:
        result = validate(state.released)
    except ToldToStop:
        log.warning("step %d: its validation is given up; the next attempt makes up for it", state.step)
        return None
    metrics = {f"{VALIDATION}{key}": value for key, value in result.metrics.items()}
    state.history.add(state.step, metrics)
    checkpoints.send({"step": state.step} | metrics)
    log.info("step %d: validation %s", state.step, ", ".join(f"{key} {value:.3f}" for key, value in result.metrics.items()))
    return result.preview


class Speed:
    """Steps per second since the last look, of training alone."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from here on: what took time before was no training."""
        self._step, self._since = step, time.monotonic()

    def at(self, step: int) -> float:
        """Steps per second since the last call, or the last `restart`."""
        steps, seconds = step - self._step, time.monotonic() - self._since
        self.restart(step)
        return steps / seconds


def take_step(
    params: Params, state: TrainingState, step: int, batch: Batch, team: Team = ALONE, at_once: int | None = None
) -> tuple[torch.Tensor, float]:
    """One optimizer step on the batch of all processes together. Returns (its loss, learning rate).

    The same state, step and batch give the same result, to the last bit with the same number of processes and clips `at_once`.
    Leaves `state.agrees` False: who entered the step into the history sets it again.
    """
    lr = set_schedule(state.optimizer, params.optimizer, step)
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    loss = accumulate(params, state.network, step, batch, team, at_once)
    team.add_up([*(parameter.grad for parameter in state.network.parameters() if parameter.grad is not None), loss])
    state.agrees = False
    state.optimizer.step()
    if state.ema is not None:
        update_ema(state.ema, state.network, params.train.ema_decay)
    state.step = step
    return loss, lr


def accumulate(params: Params, network: nn.Module, step: int, batch: Batch, team: Team, at_once: int | None) -> torch.Tensor:
    """Add this process's part of the gradient of the step's loss to the network's. Returns its part of the loss, a scalar."""
    device = next(network.parameters()).device
    seed = int(numpy.random.SeedSequence([params.seed, STEP_STREAM, step]).generate_state(1)[0])
    own = len(batch.truth)
    losses = []
    for first in range(0, own, at_once or own):
        degraded, truth = (part[first : first + (at_once or own)].to(device, non_blocking=True) for part in (batch.degraded, batch.truth))
        # Stochastic depth draws from torch's generator, for the whole batch each time: it too starts anew.
        torch.manual_seed(seed)
        place_in_batch(network, team.rank * own + first, team.size * own)
        with torch.autocast(device.type, torch.bfloat16, enabled=params.train.precision == "bf16"):
            restored = network(degraded)
        weight = len(truth) / (team.size * own)
        loss = charbonnier(restored.to(truth.dtype), truth, params.optimizer.charbonnier_eps) * weight
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def check_loss(step: int, loss: float, checkpoints: Checkpoints) -> float:
    """The loss; raises FloatingPointError, which names the last healthy step, where it is NaN or infinite."""
    if not math.isfinite(loss):
        healthy = checkpoints.safe_step()
        # The weights may have been found spoiled before any loss shows it: that says more.
        checkpoints.check()
        raise FloatingPointError(f"step {step}: the loss is {loss}; {unharmed(healthy)}")
    return loss
