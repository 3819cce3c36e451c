"""How long the network takes and how much memory, beside the published code on CPUs, or in each precision on a GPU.

`python -m benchmarks.network` measures every case in a process of its own, prints a table, and writes benchmarks/results/network-MACHINE.json
and .md. On two cores it takes about ten minutes and 9 GB of memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe
from benchmarks.report import ROOT, show, write
from vrt.model.network import VRT
from vrt.params import load_params

PUBLISHED = json.loads((Path(__file__).parent / "published_network.json").read_text())
SMALL = {
    "img_size": (6, 40, 40),
    "window_size": (6, 4, 4),
    "depths": (5, 2, 4, 2, 2, 2, 5, 2, 2, 1, 1),
    "indep_reconsts": (9, 10),
    "embed_dims": (16,) * 7 + (20,) * 4,
    "num_heads": (2,) * 11,
    "deformable_groups": 4,
}
PARTS = {
    "products of attention": ("bmm", "attention"),
    "convolutions and linear layers": ("convolution", "mm", "linear"),
    "softmax": ("softmax",),
    "sampling between pixels": ("grid_sampler", "gather", "index"),
    "normalisation": ("norm",),
    "optimizer": ("adam", "foreach"),
}
"""Operators by a part of their name; the first match counts. All others move memory or work element by element."""


@dataclass(frozen=True)
class Case:
    """One row: a network, what is done with it, on which input, in which precision."""

    network: str
    """A recipe's number, or "small": the network of the published small numbers."""
    trains: bool
    clip: tuple[int, int, int, int, int]
    checkpointed: bool = False
    precision: str = "fp32"
    compiled: bool = False

    @property
    def name(self) -> str:
        """Such as "006 train, checkpointed": what CPU rows are called in PUBLISHED."""
        parts = [f"{self.network} {'train' if self.trains else 'forward'}"]
        parts += ["checkpointed"] * self.checkpointed + [self.precision] * (self.precision != "fp32") + ["compiled"] * self.compiled
        return ", ".join(parts)


def cases() -> list[Case]:
    if not torch.cuda.is_available():
        clip = (1, 6, 3, 64, 64)
        rows = [Case("001", False, clip), Case("001", True, clip, True), Case("006", False, clip), Case("006", True, clip)]
        small = (1, 6, 3, 40, 40)
        return [*rows, Case("006", True, clip, True), Case("small", False, small), Case("small", True, small)]
    # The published crops; one clip per GPU, as the published trainings run their batch of 8 on 8 GPUs.
    rows = []
    for network, clip in (("001", (1, 6, 3, 64, 64)), ("006", (1, 6, 3, 192, 192))):
        for trains in (False, True):
            rows += [Case(network, trains, clip, network == "006", precision) for precision in ("fp32", "tf32", "bf16")]
            rows.append(Case(network, trains, clip, network == "006", "bf16", compiled=True))
    return rows


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.network == "small":
        return VRT(**SMALL, drop_path_rate=0.0, use_checkpoint=case.checkpointed)
    (path,) = (ROOT / "recipes").glob(f"{case.network}_*.yaml")
    return VRT(**load_params(path).network.model_dump(), use_checkpoint=case.checkpointed)


def work_of(case: Case, device: torch.device) -> Callable[[], None]:
    """What is timed: a forward pass without gradients, or forward, Charbonnier loss, backward and Adam."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    network = build(case).to(device).train(case.trains)
    called = torch.compile(network) if case.compiled else network
    clip = torch.rand(case.clip, device=device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if case.precision == "bf16" else nullcontext()
    adam = torch.optim.Adam(network.parameters(), lr=4e-4, betas=(0.9, 0.99))

    def forward() -> None:
        with torch.no_grad(), autocast:
            called(clip)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        with autocast:
            restored = called(clip)
        ((restored.float() - 0.5) ** 2 + 1e-9).sqrt().mean().backward()
        adam.step()

    return step if case.trains else forward


def seconds(work: Callable[[], object], device: torch.device, rounds: int, warm_up: int) -> float:
    """Median of `rounds`."""
    found = []
    for _ in range(warm_up + rounds):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[warm_up:])


def calibration(device: torch.device) -> float:
    """Seconds for a product of two 2048 x 2048 matrices in float32: what other machines' seconds are compared by."""
    a, b = torch.rand(2048, 2048, device=device), torch.rand(2048, 2048, device=device)
    return seconds(lambda: a @ b, device, rounds=30, warm_up=3)


def shares(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of each of PARTS in the time of the operators."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities={ProfilerActivity.CPU, activity}) as profiler:
        work()
    found = dict.fromkeys([*PARTS, "memory, element by element and the rest"], 0.0)
    for event in profiler.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in event.key.lower() for name in names)), list(found)[-1])
        found[part] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(found.values())
    return {part: value / total for part, value in found.items()}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One case, in this process: seconds, their ratio to the calibration measured right before and after, peak memory, and shares of time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before, work = calibration(device), work_of(case, device)
    found = seconds(work, device, rounds, warm_up=3 if case.compiled else 1)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reference = (before + calibration(device)) / 2
    return {"seconds": found, "calibration_s": reference, "ratio": found / reference, "peak_MB": peak / 2**20, "shares": shares(work, device)}


def row_of(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    ours = (name, f"{found['seconds']:.3g} s", f"{found['ratio']:.3g}", f"{found['peak_MB']:.0f} MB")
    published = PUBLISHED.get(name)
    if torch.cuda.is_available() or published is None:
        return (*ours, f"{1 / found['seconds']:.3g} a second", "")
    return (*ours, f"{published['ratio'] / found['ratio']:.2f} x faster", f"{found['peak_MB'] / published['peak_MB']:.2f} of the memory")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is timed (default: 3)")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(cases()[args.case], args.rounds)))
        return
    found = {}
    for number, case in enumerate(cases()):
        command = [sys.executable, "-m", "benchmarks.network", "--case", str(number), "--rounds", str(args.rounds)]
        child = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found[case.name] = json.loads(child.stdout.splitlines()[-1])
        print(*row_of(case.name, found[case.name]), sep="  ", flush=True)
    against = ("rate", "") if torch.cuda.is_available() else ("published network", "peak memory of it")
    header = ("", "time", "in products of 2048 x 2048 matrices", "peak memory", *against)
    parts = [(name, *(f"{share:.0%}" for share in row["shares"].values())) for name, row in found.items()]
    tables = {"time and memory": [header, *(row_of(name, row) for name, row in found.items())]}
    tables["share of time"] = [("", *next(iter(found.values()))["shares"]), *parts]
    show(tables)
    print(f"written to {write('network', 'The network: time and memory', describe(), found, tables)}")


if __name__ == "__main__":
    main()
