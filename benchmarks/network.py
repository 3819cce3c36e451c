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
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe
from benchmarks.report import ROOT, show, write
from vrt.model.block import compile_blocks
from vrt.model.network import VRT
from vrt.model.precision import computing
from vrt.params import load_params
from vrt.training.determinism import determinism

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
    "batched products: attention, alignment": ("bmm", "attention"),
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
    deterministic: bool = False

    @property
    def name(self) -> str:
        """Such as "006 train, checkpointed": what CPU rows are called in PUBLISHED."""
        parts = [f"{self.network} {'train' if self.trains else 'forward'}"]
        parts += ["checkpointed"] * self.checkpointed + [self.precision] * (self.precision != "fp32") + ["compiled"] * self.compiled
        parts += ["deterministic"] * self.deterministic
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
            # As the recipes have it: every block of 006 is computed again for its gradient.
            checkpointed = trains and network == "006"
            rows += [Case(network, trains, clip, checkpointed, precision) for precision in ("fp32", "tf32", "bf16")]
            rows.append(Case(network, trains, clip, checkpointed, "bf16", compiled=True))
        rows.append(Case(network, True, clip, network == "006", "tf32", deterministic=True))
    return rows


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.network == "small":
        return VRT(**SMALL, drop_path_rate=0.0, use_checkpoint=case.checkpointed)
    (path,) = (ROOT / "recipes").glob(f"{case.network}_*.yaml")
    return VRT(**load_params(path).network.model_dump(), use_checkpoint=case.checkpointed)


def work_of(case: Case, device: torch.device) -> Callable[[], None]:
    """What is timed: a forward pass without gradients, or forward, Charbonnier loss, backward and Adam."""
    network = build(case).to(device).train(case.trains)
    if case.compiled:
        compile_blocks(network)
    clip = torch.rand(case.clip, device=device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16) if case.precision == "bf16" else nullcontext()
    adam = torch.optim.Adam(network.parameters(), lr=4e-4, betas=(0.9, 0.99))

    def forward() -> None:
        with torch.no_grad(), autocast:
            network(clip)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        with autocast:
            restored = network(clip)
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


def shares(work: Callable[[], object], device: torch.device) -> tuple[dict[str, float], float]:
    """The share of each of PARTS in the time of the operators, and that time in seconds."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities={ProfilerActivity.CPU, activity}) as profiler:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    found = dict.fromkeys([*PARTS, "memory, element by element and the rest"], 0.0)
    # A kernel's own entry would count its time a second time.
    for event in (event for event in profiler.key_averages() if event.device_type == DeviceType.CPU):
        part = next((part for part, names in PARTS.items() if any(name in event.key.lower() for name in names)), list(found)[-1])
        found[part] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(found.values())
    return {part: value / total for part, value in found.items()}, total * 1e-6


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One case, in this process: seconds, their ratio to the calibration measured right before and after, peak memory, and shares of time;
    "first_s" is what the first round took, with all that a compiler does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = calibration(device)
    with determinism(case.deterministic), computing(case.precision):
        work = work_of(case, device)
        first = seconds(work, device, rounds=1, warm_up=0)
        found = seconds(work, device, rounds, warm_up=2 if case.compiled else 0)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # After the peak: the profiler takes memory of its own.
        parts, operators = shares(work, device)
    reference = (before + calibration(device)) / 2
    times = {"seconds": found, "first_s": first, "operators_s": operators, "calibration_s": reference, "ratio": found / reference}
    return times | {"peak_MB": peak / 2**20, "shares": parts}


def measure_apart(number: int, rounds: int) -> dict[str, Any]:
    """A case in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "benchmarks.network", "--case", str(number), "--rounds", str(rounds)]
    child = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def row_of(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    ours = (name, f"{found['seconds']:.3g} s", f"{found['ratio']:.3g}", f"{found['peak_MB']:.0f} MB")
    published = PUBLISHED.get(name)
    if torch.cuda.is_available():
        return (*ours, f"{1 / found['seconds']:.3g} a second", f"{found['operators_s'] / found['seconds']:.0%}", f"{found['first_s']:.1f} s")
    if published is None:
        return (*ours, "", "")
    return (*ours, f"{published['ratio'] / found['ratio']:.2f} x faster", f"{found['peak_MB'] / published['peak_MB']:.2f} of the memory")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is timed (default: 3)")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(cases()[args.case], args.rounds)))
        return
    found: dict[str, Any] = {}
    for number, case in enumerate(cases()):
        found[case.name] = measure_apart(number, args.rounds)
        print(*row_of(case.name, found[case.name]), sep="  ", flush=True)
    against = ("rate", "GPU at work", "the first one") if torch.cuda.is_available() else ("published network", "peak memory of it")
    header = ("", "time", "in products of 2048 x 2048 matrices", "peak memory", *against)
    parts = [(name, *(f"{share:.0%}" for share in row["shares"].values())) for name, row in found.items()]
    tables = {"time and memory": [header, *(row_of(name, row) for name, row in found.items())]}
    tables["share of time"] = [("", *next(iter(found.values()))["shares"]), *parts]
    show(tables)
    print(f"written to {write('network', 'The network: time and memory', describe(), found, tables)}")


if __name__ == "__main__":
    main()
