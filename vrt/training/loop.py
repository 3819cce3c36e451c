"""THE loop. It trains, validates and hands over snapshots; when and where they are kept is not its business."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from torch import nn

from vrt.data.sampler import Batch
from vrt.lifecycle import StopRequest
from vrt.observe import log, progress
from vrt.params import Params
from vrt.training.ema import update_ema
from vrt.training.history import History, Row
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
        speed, shown = Speed(state.step), {}
        for step, batch in batches:
            loss, lr = take_step(params, state, step, batch)
            stopping = stop.reason is not None
            last = step == plan.total_steps
            saving = last or stopping or step % plan.checkpoint_every == 0
            if step % plan.log_every == 0 or saving:
                row = log_step(state, loss.item(), lr)
                rate = speed.at(step)
                checkpoints.send(row | {"train/steps_per_s": rate})
                shown = {"loss": f"{row['train/loss']:.4f}", "lr": f"{lr:.2e}", "speed": f"{rate:.2f} step/s"}
            preview = None
            if not stopping and (last or saving or step % plan.validate_every == 0):
                result = validate(state.released)
                metrics = {f"val/{key}": value for key, value in result.metrics.items()}
                state.history.add(step, metrics)
                checkpoints.send({"step": step} | metrics)
                preview = result.preview
                log.info("step %d: validation %s", step, ", ".join(f"{key} {value:.3f}" for key, value in result.metrics.items()))
            if saving:
                checkpoints.save(state, preview)
            if preview or saving:
                speed = Speed(step)
            bar.advance(1, **shown)
            if stopping and not last:
                log.warning("stopping after step %d: %s", step, stop.reason)
                return False
    return True


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


def log_step(state: TrainingState, loss: float, lr: float) -> Row:
    """Enter the step into the history. Raises FloatingPointError for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {state.step}: the loss is {loss}; nothing of this step was saved, and the last checkpoint is sound: "
            "lower optimizer.lr, or look at the data"
        )
    return state.history.add(state.step, {"train/loss": loss, "train/lr": lr})
