"""How many clips go through the network together, where its memory may not hold a process's whole share of a batch."""

from collections.abc import Iterator

import torch

from vrt.data.clips import PreparedData
from vrt.data.sampler import Batch, Share, training_batch
from vrt.distributed import ALONE, Team
from vrt.observe import log
from vrt.params import Params
from vrt.training.loop import TrainingState, accumulate
from vrt.training.optim import set_schedule


def clips_at_once(params: Params, state: TrainingState, share: Share, data: PreparedData, team: Team) -> int:
    """`train.clips_at_once`, or for auto: all of the share on a CPU, and on a GPU the most that its memory holds, by trying, or 1 with
    `train.deterministic`.

    Every process takes the least that any of them found. Raises ValueError where not even one clip fits.
    """
    own = len(share.samples(params.train.batch_size))
    wanted = params.train.clips_at_once
    if wanted != "auto":
        return min(wanted, own)
    device = next(state.network.parameters()).device
    if device.type != "cuda":
        return own
    found = most_that_fits(params, state, training_batch(data, params, state.step + 1, share), team)
    if not found:
        raise ValueError(_too_small(params, team))
    log.info("%d of %d clips go through the network together on each GPU", found, own)
    return found


def halves(count: int) -> list[int]:
    """`count`, and what halving it again and again leaves, down to 1."""
    found = [count]
    while found[-1] > 1:
        found.append((found[-1] + 1) // 2)
    return found


def most_that_fits(params: Params, state: TrainingState, batch: Batch, team: Team = ALONE) -> int:
    """The most clips of a batch, by halves, whose gradient every process can compute with everything trained; 0: not even one.

    With `train.deterministic` 1 is the most: what is free differs from attempt to attempt, and other parts are added up in another order.
    Changes nothing of the state.
    """
    # What is frozen at first is not for ever, and needs memory then.
    set_schedule(state.optimizer, params.optimizer, params.train.total_steps)
    state.network.train()
    for count in [1] if params.train.deterministic else halves(len(batch.truth)):
        beside = bytes_to_come(state.optimizer)
        if count < len(batch.truth):
            # The other parts go through the network while the gradients of the first are there.
            beside += gradient_bytes(state.optimizer)
        fits = _fits(params, state, Batch(batch.degraded[:count], batch.truth[:count]), beside)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not team.any(not fits):
            return count
        log.info("the GPUs' memory does not hold %d clips at once", count)
    return 0


def bytes_to_come(optimizer: torch.optim.Optimizer) -> int:
    """What Adam's first steps add for good to the memory in use: two moments of each parameter that has none yet."""
    return sum(2 * parameter.nbytes for parameter in _trained(optimizer) if parameter not in optimizer.state)


def gradient_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the gradients take of all that is ever trained."""
    return sum(parameter.nbytes for parameter in _trained(optimizer))


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _fits(params: Params, state: TrainingState, batch: Batch, beside: int) -> bool:
    try:
        kept = torch.empty(beside, dtype=torch.uint8, device=next(state.network.parameters()).device)
        accumulate(params, state.network, state.step + 1, batch, ALONE, None)
        del kept
    except torch.OutOfMemoryError:
        return False
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    return True


def _too_small(params: Params, team: Team) -> str:
    remedy = "lower train.crop or train.frames" if params.train.activation_checkpointing else "set train.activation_checkpointing: true"
    return f"rank {team.rank}: the GPU's memory does not hold a single clip of {params.train.frames} frames and {params.train.crop} pixels; {remedy}"
