"""What a checkpoint costs the training, at the size of the published recipe 001: side by side with KAIR's way, and with the bare minimum.

`python -m benchmarks.checkpoint` starts local services of its own (or uses those of MLFLOW_TRACKING_URI and AWS_ENDPOINT_URL), measures, prints
a table, and writes benchmarks/results/checkpoint-MACHINE.json and .md. Takes about three minutes and 4 GB of memory and of disk.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import psutil
import torch
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from benchmarks.local import local_services
from benchmarks.machine import describe
from benchmarks.report import ROOT, show, write
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.registry import MlflowRegistry
from vrt.checkpoint.saver import Saver
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.model.network import VRT
from vrt.params import load_params
from vrt.training.ema import copy_for_ema
from vrt.training.history import History
from vrt.training.loop import TrainingState
from vrt.training.optim import make_optimizer
from vrt.training.session import SnapshotSink

SECONDS_BETWEEN_CHECKPOINTS = 30.0
# What is compared with one another is taken at its best, so that other work on the machine shows as little as it can.
BEST = {"bare copy, one block", "bare copy, tensor by tensor", "synchronous torch.save", "blocked"}
RECIPE_001 = {
    "upscale": 4,
    "img_size": (6, 64, 64),
    "window_size": (6, 8, 8),
    "depths": (8,) * 7 + (4,) * 6,
    "indep_reconsts": (11, 12),
    "embed_dims": (120,) * 7 + (180,) * 6,
    "num_heads": (6,) * 13,
    "pa_frames": 2,
    "deformable_groups": 12,
    "nonblind_denoising": False,
    "drop_path_rate": 0.2,
}


def build_state(device: torch.device) -> TrainingState:
    """The state of recipe 001 after one step: the optimizer has its moments."""
    network = VRT(**RECIPE_001).to(device)
    optimizer = make_optimizer(network, load_params(ROOT / "recipes" / "quickstart.yaml").optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return TrainingState(network, copy_for_ema(network), optimizer, History(), 0)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for child in children for tensor in tensors_of(child)]


def changing_tensors(state: TrainingState) -> list[torch.Tensor]:
    """What a save must copy: weights, averages, and the optimizer's state; not the buffers, which never change."""
    networks = [*state.network.parameters(), *state.ema.parameters()]
    return [parameter.detach() for parameter in networks] + tensors_of(state.optimizer.state_dict())


def save_as_kair_does(state: TrainingState, folder: Path) -> None:
    """Each part to the CPU, then torch.save to its name, while the training waits."""
    for name, module in (("G", state.network), ("E", state.ema)):
        torch.save({key: value.cpu() for key, value in module.state_dict().items()}, folder / f"{state.step}_{name}.pth")
    torch.save(state.optimizer.state_dict(), folder / f"{state.step}_optimizerG.pth")


def seconds(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class PeakMemory:
    """The most memory of this process while the block ran, over what it had before, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self._process, self._ended = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.extra = self._most - self._before


class Saves:
    """The real thing: sink, saver, publisher, S3 and MLflow; keeps what each save reports of itself."""

    def __init__(self, state: TrainingState, folder: Path):
        self.folder, self._state = CheckpointFolder(folder), state
        self.folder.prepare()
        registry = MlflowRegistry(Lineage(f"benchmark-{time.time_ns()}", "0" * 64, {}))
        registry.open({}, {})
        self.address = registry.checkpoints_address
        self.publisher = Publisher(self.folder, S3Store(self.address), registry)
        self.saver = Saver(self.folder, self.publisher)
        self.sink = SnapshotSink(self.saver, self.publisher, {"lineage": registry.lineage.id, "identity": {}, "origin": {}})
        self._reported: dict[str, float] = {}
        self._registered = threading.Event()
        send = self.publisher.send

        def listen(row: dict[str, float]) -> None:
            self._reported |= row
            if "save/registered_s" in row:
                self._registered.set()
            send(row)

        self.publisher.send = listen
        self.publisher.start()

    def one(self, meanwhile: Callable[[Callable[[], bool]], object] = lambda ended: None) -> dict[str, float]:
        """Save a step and see it registered; `meanwhile` is given a way to know when that is. Returns the step's metrics."""
        self._state.step += 1
        self._registered.clear()
        blocked = seconds(lambda: self.sink.save(self._state, None))
        meanwhile(self._registered.is_set)
        assert self._registered.wait(600), self.saver.failure
        return self._reported | {"save/blocked_s": blocked}


def steps_per_second(ended: Callable[[], bool]) -> float:
    """How quickly a stand-in for training goes until `ended`: convolutions on all threads."""
    layer, clip, done, started = torch.nn.Conv2d(64, 64, 3, padding=1), torch.rand(4, 64, 96, 96), 0, time.perf_counter()
    while not ended() or not done:
        layer(clip).sum().backward()
        done += 1
    return done / (time.perf_counter() - started)


def copy_pace(saves: Saves, folder: Path, step: int) -> dict[str, float]:
    """What S3 alone takes for the same files, one after the other: boto3's upload, and reading them back."""
    client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    bucket, key = saves.address[5:].split("/", 1)
    names = [path.name for path in folder.glob(f"{step}_*.pth")]
    put = seconds(lambda: [client.upload_file(str(folder / name), bucket, f"{key}/bare/{name}", Config=TransferConfig()) for name in names])

    def read() -> None:
        for name in names:
            for _ in client.get_object(Bucket=bucket, Key=f"{key}/bare/{name}")["Body"].iter_chunks(1 << 20):
                pass

    return {"upload": put, "read back": seconds(read)}


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """All times in seconds, sizes in bytes; over `rounds`, each of which does everything, the best of BEST and the median of the rest."""
    state = build_state(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    live = changing_tensors(state)
    size = sum(tensor.nbytes for tensor in live)
    source = torch.zeros(size, dtype=torch.uint8, device=live[0].device)
    target = torch.empty(size, dtype=torch.uint8, pin_memory=source.is_cuda)
    apart = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in live]
    kair = folder / "kair"
    kair.mkdir()
    (folder / "ours").mkdir()
    times: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)

    save_as_kair_does(state, kair)
    target.copy_(source)
    torch._foreach_copy_(apart, live)
    saves = Saves(state, folder / "ours")
    with PeakMemory() as memory:
        first = saves.one()
    for _ in range(rounds):
        for _ in range(3):
            note("bare copy, one block", seconds(lambda: target.copy_(source)))
            note("bare copy, tensor by tensor", seconds(lambda: torch._foreach_copy_(apart, live)))
        with PeakMemory() as theirs:
            note("synchronous torch.save", seconds(lambda: save_as_kair_does(state, kair)))
        note("peak memory of torch.save", theirs.extra)
        reported = saves.one()
        for name in ("blocked", "committed", "registered"):
            note(name, reported[f"save/{name}_s"])
        alone_ends = time.perf_counter() + 5
        alone = steps_per_second(lambda end=alone_ends: time.perf_counter() > end)
        beside: list[float] = []
        note("blocked", saves.one()["save/blocked_s"])
        reported = saves.one(meanwhile=lambda ended, beside=beside: beside.append(steps_per_second(ended)))
        note("training time lost behind it", max(0.0, reported["save/registered_s"] * (1 - beside[0] / alone)))
        for path in (folder / "ours").iterdir():
            if not path.name.startswith(f"{state.step}_"):
                path.unlink()
    for name, value in copy_pace(saves, folder / "ours", state.step).items():
        note(f"bare S3 {name}", value)
    assert saves.publisher.finish(60) == []
    files = {path.name.split("_", 1)[1]: path.stat().st_size for path in (folder / "ours").glob(f"{state.step}_*.pth")}
    found = {name: min(values) if name in BEST else statistics.median(values) for name, values in times.items()}
    return {"files": files, "changing": size, "first blocked": first["save/blocked_s"], "first peak memory": memory.extra} | found


def rows_of(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, judged) for the table."""

    def s(name: str) -> str:
        return f"{found[name]:.3f} s"

    kair, bare, apart = found["synchronous torch.save"], found["bare copy, one block"], found["bare copy, tensor by tensor"]
    blocked, share = found["blocked"], found["blocked"] / SECONDS_BETWEEN_CHECKPOINTS
    aim = 20 if torch.cuda.is_available() else 10
    whole = sum(found["files"].values())
    return [
        ("bytes of G, E and optimizer / of these change", f"{whole / 1e6:.0f} / {found['changing'] / 1e6:.0f} MB", ""),
        ("synchronous torch.save of the same files", s("synchronous torch.save"), ""),
        ("bare copy of what changes, as one block", s("bare copy, one block"), ""),
        ("bare copy of what changes, tensor by tensor", s("bare copy, tensor by tensor"), ""),
        ("training blocked by a save", s("blocked"), f"1/{kair / blocked:.0f} of torch.save (aim: 1/{aim})"),
        ("", "", f"{blocked / bare:.2f} x one block, {blocked / apart:.2f} x tensor by tensor (aim: 1.3)"),
        ("training blocked by the first save (buffers)", s("first blocked"), ""),
        ("blocked share, 30 s between checkpoints", f"{share:.2%}", "aim: below 1 %"),
        ("training time lost behind it, per save", s("training time lost behind it"), "shares the processor with what is committed and served here"),
        ("step to committed", s("committed"), ""),
        ("step to registered", s("registered"), f"S3 alone: {found['bare S3 upload']:.2f} s up, {found['bare S3 read back']:.2f} s back"),
        (
            "peak extra memory, first save",
            f"{found['first peak memory'] / 1e6:.0f} MB",
            f"torch.save: {found['peak memory of torch.save'] / 1e6:.0f} MB",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: 5)")
    rounds = parser.parse_args().rounds
    # Others at work on the machine show in every number below: a run is judged by it.
    busy = f"{os.getloadavg()[0]:.1f}"
    with local_services() as scratch:
        found = measure(rounds, scratch)
    machine = describe() | {"load before": busy}
    tables = {"blocked, torch.save and copies: the best; the rest: medians": [("", "measured", "judged"), *rows_of(found)]}
    show(tables)
    print(f"written to {write('checkpoint', 'A checkpoint of recipe 001: what it costs the training', machine, found, tables)}")


if __name__ == "__main__":
    main()
