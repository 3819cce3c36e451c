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
from vrt.data.sampler import Batch
from vrt.lifecycle import StopRequest
from vrt.observe import log, progress
from vrt.params import Params, Train
from vrt.training.ema import update_ema
from vrt.training.history import History, Row
from vrt.training.optim import charbonnier, set_schedule

# Keeps the draws of a training step apart from other draws of the same seed.
STEP_STREAM = 7_001
SPOILED = "nothing of this step was saved, and the last checkpoint is sound: lower optimizer.lr, or look at the data"


@dataclass
class TrainingState:
    """All that the next step needs; the rest is a function of (seed, step)."""

    network: nn.Module
    ema: nn.Module | None
    optimizer: torch.optim.Adam
    history: History
    step: int
    """Steps done."""

    @property
    def released(self) -> nn.Module:
        """The network that users get, and validation measures: E where it is kept, else G."""
        return self.ema or self.network


@dataclass(frozen=True)
class Validation:
    metrics: dict[str, float]
    """Such as {"psnr": 31.2, "ssim": 0.91}."""
    preview: bytes
    """PNG: input | restored | truth."""


class Checkpoints(Protocol):
    """Where snapshots and metrics go. Neither call waits for storage."""

    def save(self, state: TrainingState, preview: bytes | None) -> None: ...
    def send(self, row: Row) -> None: ...


def train(
    params: Params,
    state: TrainingState,
    batches: Iterable[tuple[int, Batch]],
    checkpoints: Checkpoints,
    validate: Callable[[nn.Module], Validation],
    stop: StopRequest,
) -> bool:
    """Train from `state.step` to `params.train.total_steps`. True: done. False: stopped early on request, with everything saved.

    `batches` yields (step, batch) for each step to do. Raises FloatingPointError where the loss is no number any more: nothing is saved then.
    """
    plan = params.train
    with progress("train", plan.total_steps, "steps", done=state.step) as bar:
        if state.step and due(plan, state.step).validate and not state.history.has(state.step, "val/psnr"):
            # The attempt before was stopped at this step and had no time to validate it.
            validate_step(state, checkpoints, validate)
        speed, shown = Speed(state.step), {}
        for step, batch in batches:
            loss, lr = take_step(params, state, step, batch)
            reached(Phase.STEP)
            now = due(plan, step)
            stopping = stop.reason is not None and step < plan.total_steps
            if now.log or stopping:
                check_loss(step, loss.item())
            if now.save or stopping:
                check_weights(state)
            if now.log:
                rate = speed.at(step)
                checkpoints.send(state.history.add(step, {"train/loss": loss.item(), "train/lr": lr}) | {"train/steps_per_s": rate})
                shown = {"loss": f"{loss.item():.4f}", "lr": f"{lr:.2e}", "steps/s": f"{rate:.2f}"}
            preview = None
            if now.validate and not stopping:
                try:
                    preview = validate_step(state, checkpoints, validate)
                except BaseException:
                    # The steps are sound whatever validation ran into; the next attempt validates this one.
                    checkpoints.save(state, None)
                    raise
                # A validation takes its time: who was told to stop meanwhile does not begin another step.
                stopping = stop.reason is not None and step < plan.total_steps
            if now.save or stopping:
                checkpoints.save(state, preview)
            if now.validate or now.save:
                speed = Speed(step)
            bar.advance(1, **shown)
            if stopping:
                log.warning("stopping after step %d: %s", step, stop.reason)
                return False
    return True


class Due(NamedTuple):
    log: bool
    validate: bool
    save: bool


def due(plan: Train, step: int) -> Due:
    """What to do after a step: a function of the step, so that the history does not show where a training was interrupted.

    Every checkpoint that is due is logged and validated too, so that each says how good it is.
    """
    last = step == plan.total_steps
    save = last or step % plan.checkpoint_every == 0
    return Due(log=save or step % plan.log_every == 0, validate=save or step % plan.validate_every == 0, save=save)


def validate_step(state: TrainingState, checkpoints: Checkpoints, validate: Callable[[nn.Module], Validation]) -> bytes:
    """Validate the released network, enter the result into the history, and return the preview."""
    result = validate(state.released)
    metrics = {f"val/{key}": value for key, value in result.metrics.items()}
    state.history.add(state.step, metrics)
    checkpoints.send({"step": state.step} | metrics)
    log.info("step %d: validation %s", state.step, ", ".join(f"{key} {value:.3f}" for key, value in result.metrics.items()))
    return result.preview


class Speed:
    """Steps per second since the last look, of training alone."""

    def __init__(self, step: int):
        self._step, self._since = step, time.monotonic()

    def at(self, step: int) -> float:
        steps, seconds = step - self._step, time.monotonic() - self._since
        self._step, self._since = step, time.monotonic()
        return steps / seconds


def take_step(params: Params, state: TrainingState, step: int, batch: Batch) -> tuple[torch.Tensor, float]:
    """One optimizer step. Returns (loss, learning rate). The same state, step and batch give the same result."""
    device = next(state.network.parameters()).device
    lr = set_schedule(state.optimizer, params.optimizer, step)
    # Stochastic depth draws from torch's generator: it too starts anew at each step.
    torch.manual_seed(int(numpy.random.SeedSequence([params.seed, STEP_STREAM, step]).generate_state(1)[0]))
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    restored = state.network(batch.degraded.to(device, non_blocking=True))
    loss = charbonnier(restored, batch.truth.to(device, non_blocking=True), params.optimizer.charbonnier_eps)
    loss.backward()
    state.optimizer.step()
    if state.ema is not None:
        update_ema(state.ema, state.network, params.train.ema_decay)
    state.step = step
    return loss.detach(), lr


def check_loss(step: int, loss: float) -> None:
    """Raises FloatingPointError for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {step}: the loss is {loss}; {SPOILED}")


def check_weights(state: TrainingState) -> None:
    """Raises FloatingPointError for weights that are NaN or infinite: a gradient can spoil them before any loss shows it."""
    for name, parameter in state.network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FloatingPointError(f"step {state.step}: {name} holds values that are no numbers; {SPOILED}")
