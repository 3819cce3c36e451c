"""A training small enough to repeat: a network of a few numbers, in the real loop and on a real disk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.saver import Saver
from vrt.data.sampler import Batch
from vrt.params import Optimizer, Params, load_params
from vrt.training.ema import copy_for_ema
from vrt.training.history import History
from vrt.training.loop import TrainingState, Validation, train
from vrt.training.optim import make_optimizer
from vrt.training.session import SnapshotSink, restore

PROJECT = Path(__file__).resolve().parents[2]
LINEAGE = "tiny-0123456789"


class Tiny(nn.Module):
    """Has what resuming may lose: parameters that start frozen, and a layer that draws from torch's generator."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.3), nn.Conv2d(4, 3, 3, padding=1))
        self.flow = nn.Conv2d(3, 3, 1)

    def forward(self, clip: Tensor) -> Tensor:
        frames = clip.flatten(0, 1)
        return (self.body(self.flow(frames)) + frames).unflatten(0, clip.shape[:2])


def make_batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    truth = torch.rand(1, 2, 3, 8, 8, generator=generator)
    return Batch(truth + 0.1 * torch.randn(truth.shape, generator=generator), truth)


class Stop:
    """Stands for `StopRequest`: no signals in these tests."""

    reason: str | None = None


class Registered:
    """Stands for store and registry, which have tests of their own."""

    def __init__(self):
        self.steps: list[int] = []
        self.rows: list[dict[str, float]] = []

    def publish(self, manifest: Manifest, folder: Path) -> str:
        return "s3://bucket/somewhere"

    def upload(self, step: int, file: FileEntry, folder: Path) -> None: ...

    def registered(self) -> dict[int, object]:
        return {}

    def check(self, manifest: Manifest) -> None: ...

    def register(self, manifest: Manifest, address: str, folder: Path) -> None:
        self.steps.append(manifest.step)

    def send(self, rows: list[dict[str, float]]) -> None:
        self.rows += rows

    def note(self, key: str, text: str) -> None: ...

    def manifest(self, address: str) -> Manifest:
        raise NotImplementedError

    def fetch(self, address: str, file: FileEntry, path: Path) -> None:
        raise NotImplementedError


@pytest.fixture
def params() -> Params:
    """Six steps; everything that happens at some steps only does happen, at different ones."""
    quickstart = load_params(PROJECT / "recipes" / "quickstart.yaml")
    return quickstart.model_copy(
        update={
            "optimizer": Optimizer(
                lr=1e-3,
                lr_min=1e-7,
                lr_period=6,
                betas=(0.9, 0.99),
                charbonnier_eps=1e-9,
                flow_names=("flow",),
                flow_lr_scale=0.125,
                flow_frozen_steps=2,
            ),
            "train": quickstart.train.model_copy(
                update={"total_steps": 6, "ema_decay": 0.5, "log_every": 2, "validate_every": 2, "checkpoint_every": 3}
            ),
        }
    )


@pytest.fixture
def fresh(params: Params) -> Callable[..., TrainingState]:
    """The state before step 1."""

    def make(network: Callable[[], nn.Module] = Tiny, params: Params = params) -> TrainingState:
        torch.manual_seed(params.seed)
        built = network()
        return TrainingState(built, copy_for_ema(built), make_optimizer(built, params.optimizer), History(), 0)

    return make


def validate(network: nn.Module) -> Validation:
    with torch.no_grad():
        error = (network(make_batch(999).degraded) - make_batch(999).truth).square().mean()
    return Validation({"psnr": -10 * error.log10().item()}, b"a picture of " + str(error.item()).encode())


class Attempt:
    """One process of the training: its state, its folder, and what it sent."""

    def __init__(self, params: Params, path: Path, state: TrainingState, first_to_stop: int | None = None, validate=validate):
        self.folder, self.state, self.registered, self.measure = CheckpointFolder(path), state, Registered(), validate
        self.folder.prepare()
        steps = self.folder.steps()
        if steps:
            assert self.folder.problems(steps[0], LINEAGE) == []
            restore(state, self.folder.manifest(steps[0]), path)
        stop = Stop()

        def batches():
            for step in range(state.step + 1, params.train.total_steps + 1):
                if step == first_to_stop:
                    stop.reason = "received SIGTERM"
                yield step, make_batch(step)

        publisher = Publisher(self.folder, self.registered, self.registered)
        publisher.start()
        saver = Saver(self.folder, publisher, params.checkpoints.most_failed_saves)
        saver.safe_step = state.step
        # Each attempt comes from elsewhere: that must not show in the files.
        sink = SnapshotSink(saver, publisher, {"lineage": LINEAGE, "identity": params.identity(), "origin": {"host": str(id(self))}})
        try:
            self.done = train(params, state, batches(), sink, validate, stop)
        finally:
            saver.wait()
            self.missing = publisher.finish(60)
        sink.check()
        assert saver.failure is None

    def files(self, step: int) -> dict[str, bytes]:
        """The files of a checkpoint, without the manifest, which names its origin."""
        return {path.name: path.read_bytes() for path in self.folder.path.glob(f"{step}_*") if path.suffix != ".json"}


@pytest.fixture
def attempt() -> type[Attempt]:
    return Attempt


@pytest.fixture
def batch_of() -> Callable[[int], Batch]:
    """The batch of a step."""
    return make_batch
