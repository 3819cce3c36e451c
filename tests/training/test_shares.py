"""However a batch is shared out and however many of its clips go through the network together: its gradient is the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vrt.data.sampler import Batch, Share
from vrt.distributed import ALONE, Team
from vrt.lifecycle import StopRequest
from vrt.params import Params, load_params
from vrt.training import memory
from vrt.training.loop import TrainingState, Validation, accumulate, take_step, train
from vrt.training.session import build_state

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
CLIPS = 4


class Member(Team):
    """One of several processes, without the others: what it would add is looked at before it is added up."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


@pytest.fixture
def params() -> Params:
    """Many branches are dropped, so that a mask that is not its own shows in every gradient."""
    quickstart = load_params(RECIPE)
    network = quickstart.network.model_copy(
        update={"drop_path_rate": 0.5, "depths": (1,) * 8, "embed_dims": (8,) * 8, "num_heads": (2,) * 8, "indep_reconsts": (7,)}
    )
    return quickstart.model_copy(update={"network": network.model_copy(update={"deformable_groups": 2})})


@pytest.fixture
def state(params: Params) -> TrainingState:
    state = build_state(params, torch.device("cpu"))
    state.network.train()
    return state


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(CLIPS, 6, 3, 16, 16, generator=generator)
    return Batch(truth + 0.1 * torch.randn(truth.shape, generator=generator), truth)


@pytest.fixture
def gradient(params: Params, state: TrainingState, batch: Batch) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(loss, gradients) of step 7 by `world` processes, whose parts are added."""

    def of(world: int, at_once: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        state.optimizer.zero_grad(set_to_none=True)
        own = CLIPS // world
        shares = [Batch(*(part[rank * own : (rank + 1) * own] for part in (batch.degraded, batch.truth))) for rank in range(world)]
        losses = [accumulate(params, state.network, 7, share, Member(rank, world), at_once) for rank, share in enumerate(shares)]
        named = state.network.named_parameters()
        return torch.stack(losses).sum(), {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}

    return of


@pytest.mark.parametrize("world, at_once", [(1, 3), (2, 1), (4, None)])
def test_the_gradient_is_that_of_the_whole_batch(world: int, at_once: int | None, gradient):
    whole_loss, whole = gradient(1, None)
    loss, grads = gradient(world, at_once)

    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    assert grads.keys() == whole.keys()
    for name in whole:
        scale = whole[name].abs().max().item()
        torch.testing.assert_close(grads[name], whole[name], rtol=0, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}")


def test_bf16_rounds_the_gradient_and_tf32_on_a_cpu_does_not(params, state, batch):
    def gradient_by(precision: str) -> torch.Tensor:
        state.optimizer.zero_grad(set_to_none=True)
        by = params.model_copy(update={"train": params.train.model_copy(update={"precision": precision})})
        accumulate(by, state.network, 7, batch, ALONE, None)
        return torch.cat([parameter.grad.flatten() for parameter in state.network.parameters() if parameter.grad is not None])

    exact, rounded = gradient_by("fp32"), gradient_by("bf16")

    assert torch.equal(gradient_by("tf32"), exact)
    assert not torch.equal(rounded, exact)
    assert torch.cosine_similarity(rounded, exact, dim=0) > 0.98


def with_memory_for(clips: int) -> Callable[..., torch.Tensor]:
    """`accumulate` on a GPU that holds so many at once: its memory can't be made small here."""

    def accumulated(params, network, step, few, team, at_once):
        if len(few.truth) > clips:
            raise torch.OutOfMemoryError
        return accumulate(params, network, step, few, team, at_once)

    return accumulated


@pytest.mark.parametrize("holds, expected", [(4, 4), (3, 2), (1, 1), (0, 0)])
def test_the_probe_finds_how_many_clips_the_memory_holds_and_changes_nothing(holds: int, expected: int, params, state, batch, monkeypatch):
    before = {key: value.clone() for key, value in state.network.state_dict().items()}

    monkeypatch.setattr(memory, "accumulate", with_memory_for(holds))

    assert memory.most_that_fits(params, state, batch) == expected
    assert all(parameter.grad is None for parameter in state.network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in state.network.state_dict().items())


def test_the_probe_leaves_room_for_what_adam_does_not_have_yet(params, state, batch, monkeypatch):
    weights = 4 * sum(parameter.numel() for parameter in state.network.parameters())
    assert memory.bytes_to_come(state.optimizer) == 2 * weights
    beside, empty = [], torch.empty
    monkeypatch.setattr(memory.torch, "empty", lambda size, **options: beside.append(size) or empty(size, **options))
    memory.most_that_fits(params, state, batch)
    assert beside == [2 * weights], "all clips go together: their gradients come as what was kept for them goes"
    beside.clear()
    monkeypatch.setattr(memory, "accumulate", with_memory_for(2))
    memory.most_that_fits(params, state, batch)
    assert beside == [2 * weights, 3 * weights], "the second two clips go while the gradients of the first two are there"

    unfrozen = params.model_copy(update={"optimizer": params.optimizer.model_copy(update={"flow_frozen_steps": 0})})
    take_step(unfrozen, state, 1, batch)

    assert memory.bytes_to_come(state.optimizer) == 0


@pytest.mark.parametrize("holds, expected", [(4, 1), (0, 0)])
def test_how_deterministic_steps_are_shared_out_does_not_depend_on_free_memory(holds: int, expected: int, params, state, batch, monkeypatch):
    monkeypatch.setattr(memory, "accumulate", with_memory_for(holds))
    deterministic = params.model_copy(update={"train": params.train.model_copy(update={"deterministic": True})})
    assert memory.most_that_fits(deterministic, state, batch) == expected


@pytest.mark.parametrize("wanted, expected", [("auto", CLIPS), (3, 3)])
def test_on_a_cpu_and_by_a_number_deterministic_steps_are_shared_out_as_others(wanted, expected: int, params, state):
    train = params.train.model_copy(update={"deterministic": True, "clips_at_once": wanted, "batch_size": CLIPS})
    by = params.model_copy(update={"train": train})
    assert memory.clips_at_once(by, state, Share(0, 1), None, Team()) == expected


def test_the_probe_finds_what_the_memory_of_a_real_gpu_holds(gpu, params, batch):
    state = build_state(params, gpu)
    more = Batch(*(part.repeat(2, 1, 1, 3, 3) for part in (batch.degraded, batch.truth)))
    # Adam has its moments from here on.
    take_step(params, state, 1, batch)

    def peak_of(clips: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        accumulate(params, state.network, 1, Batch(more.degraded[:clips], more.truth[:clips]), ALONE, None)
        state.optimizer.zero_grad(set_to_none=True)
        return torch.cuda.max_memory_allocated()

    between = (peak_of(2) + peak_of(4)) / 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(between / torch.cuda.get_device_properties(gpu).total_memory)
    try:
        assert memory.most_that_fits(params, state, more) == 2
        take_step(params, state, 2, Batch(more.degraded[:2], more.truth[:2]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_too_little_memory_for_one_clip_is_told_with_what_helps(params: Params):
    message = "rank 0: the GPU's memory does not hold a single clip of 6 frames and 48 pixels; set train.activation_checkpointing: true"
    assert memory._too_small(params, Team()) == message


class Pair(Member):
    """One of two processes; the other is told to stop at the call of that number, and could not read a clip at each step."""

    def __init__(self, rank: int, stopping: int):
        super().__init__(rank, 2)
        self.calls, self.stopping = 0, stopping

    def total(self, *numbers: float) -> tuple[float, ...]:
        self.calls += 1
        told_to_stop, *others = numbers
        return (told_to_stop + (self.calls >= self.stopping), *(number + 1 for number in others))


class Heard:
    """What a training hands over."""

    def __init__(self):
        self.saved: list[int] = []
        self.rows: list[dict[str, float]] = []

    def save(self, state: TrainingState, preview: bytes | None) -> None:
        self.saved.append(state.step)

    def send(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def check(self) -> None: ...

    def safe_step(self) -> int:
        return 0


@pytest.mark.parametrize("rank", [0, 1])
def test_told_to_stop_anywhere_all_stop_after_the_same_step_and_only_the_leader_validates(rank: int, params, state, batch):
    heard, validated = Heard(), []
    stop = StopRequest()

    def validate(_network: torch.nn.Module) -> Validation:
        validated.append(state.step)
        return Validation({"psnr": 20.0}, b"")

    every_second = params.train.model_copy(update={"validate_every": 2, "checkpoint_every": 100})
    # One call before the first step, and three for two steps: the first is saved, for which nobody waits; the second is validated, after which
    # all are asked again.
    done = train(
        params.model_copy(update={"train": every_second}),
        state,
        ((step, Batch(batch.degraded[:2], batch.truth[:2])) for step in range(1, 10)),
        heard,
        validate,
        stop,
        Pair(rank, stopping=5),
    )

    assert not done and stop.reason is None
    assert heard.saved == [1, 3] and state.step == 3
    assert validated == ([2] if rank == 0 else [])
    assert [row["data/skipped"] for row in heard.rows if "data/skipped" in row] == [1, 2, 3]
