"""What more processes give: steps per second of one training by one process and by several, and the share that adding up gradients takes.

`python -m benchmarks.scaling` trains one batch by 1, 2, 4, ... processes, one per GPU, or on a CPU by 1 and 2 of one thread each, prints tables, and
writes benchmarks/results/scaling-MACHINE.json and .md. Takes about three minutes on a CPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.report import RESULTS, ROOT, show, write
from vrt.data.sampler import Batch, Share
from vrt.distributed import Torchrun, device_here, joined
from vrt.model.precision import computing
from vrt.params import Params, load_params
from vrt.training.loop import take_step
from vrt.training.memory import most_that_fits
from vrt.training.session import build_network, build_state, hand_out

RECIPE_ON_GPU, RECIPE_ON_CPU = "001_videosr_bi_REDS_6frames", "quickstart"
CLIPS = 8
WARM_UP, STEPS = 3, 12
PROJECTED_GPUS = 8
# What one of them does of a step of the projection: 1 of 8 clips, measured by benchmarks/network.py.
MEASURED_STEPS = "network-nvidia-h100-80gb-hbm3-16-cores.json"
MEASURED_KINDS = {"tf32": "001 train, tf32", "fp32": "001 train", "bf16": "001 train, bf16"}
# Bytes per second that one process exchanges with the others: data sheets' orders of magnitude, measured nowhere here.
LINKS = {"NVLink, 300 GB/s": 300e9, "PCIe 4, 20 GB/s": 20e9, "Ethernet of 10 Gb/s": 1.1e9}


def measure(recipe: str, path: Path) -> None:
    """In each process that torchrun started: time steps; rank 0 writes what it found to `path`."""
    params = load_params(ROOT / "recipes" / f"{recipe}.yaml")
    params = params.model_copy(update={"train": params.train.model_copy(update={"batch_size": CLIPS, "threads": 1})})
    torch.set_num_threads(1)
    device = device_here()
    with computing(params.train.precision), joined(device) as team:
        assert isinstance(team, Torchrun)
        state = build_state(params, device)
        hand_out(state, team)
        batch = random_batch(params, Share(team.rank, team.size))
        at_once = most_that_fits(params, state, batch, team) if device.type == "cuda" else None
        for step in range(1, WARM_UP + STEPS + 1):
            if step == WARM_UP + 1:
                started, before = time.perf_counter(), team.seconds
            loss, _ = take_step(params, state, step, batch, team, at_once)
            # Waits for the GPU.
            loss.item()
        taken = time.perf_counter() - started
        if team.leads:
            found = {"steps_per_s": STEPS / taken, "adding_up": (team.seconds - before) / taken}
            path.write_text(json.dumps(found))


def random_batch(params: Params, share: Share) -> Batch:
    side = params.train.crop // params.network.upscale
    clips = len(share.samples(CLIPS))
    generator = torch.Generator().manual_seed(share.rank)
    shape = (clips, params.train.frames, 3)
    return Batch(torch.rand(*shape, side, side, generator=generator), torch.rand(*shape, *[params.train.crop] * 2, generator=generator))


def run(processes: int, recipe: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
        subprocess.run([sys.executable, *launch, "-m", "benchmarks.scaling", recipe, str(path)], cwd=ROOT, env=environment, check=True)
        return json.loads(path.read_text())


def gradient_bytes(recipe: str) -> int:
    with torch.device("meta"):
        network = build_network(load_params(ROOT / "recipes" / f"{recipe}.yaml").network)
    return 4 * sum(parameter.numel() for parameter in network.parameters())


def projection(size: int) -> list[list[str]]:
    """What adding up gradients of `size` bytes makes of PROJECTED_GPUS that each compute one clip, as measured, and send 2 (n - 1) / n of them."""
    measured = json.loads((RESULTS / MEASURED_STEPS).read_text())["measured"]
    steps = {kind: measured[key]["seconds"] for kind, key in MEASURED_KINDS.items()}
    sent = 2 * (PROJECTED_GPUS - 1) / PROJECTED_GPUS * size
    rows = [["between GPUs", "adding up", *(f"{kind}, {seconds:.2f} s a clip: share; times one GPU" for kind, seconds in steps.items())]]
    for link, speed in LINKS.items():
        took = sent / speed
        shares = [f"{took / (seconds + took):.1%}; {PROJECTED_GPUS * seconds / (seconds + took):.1f}" for seconds in steps.values()]
        rows.append([link, f"{1000 * took:.1f} ms", *shares])
    return rows


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    gpus = torch.cuda.device_count()
    counts = [count for count in (1, 2, 4, 8) if count <= (gpus or 2)]
    recipe = RECIPE_ON_GPU if gpus else RECIPE_ON_CPU
    found: dict[str, Any] = {str(count): run(count, recipe) for count in counts}
    alone = found["1"]["steps_per_s"]
    rows = [["processes", "steps/s", "times one process", "share of adding up, waiting for the slower included"]]
    for count, one in found.items():
        rows.append([count, f"{one['steps_per_s']:.3f}", f"{one['steps_per_s'] / alone:.2f}", f"{one['adding_up']:.1%}"])
    size = gradient_bytes(RECIPE_ON_GPU)
    projected = (
        f"PROJECTION: recipe 001 on {PROJECTED_GPUS} GPUs, from steps measured on one H100 and speeds of data sheets; {size / 1e6:.0f} MB of "
        "gradients, nothing hidden. The recipe has tf32, and activation checkpointing, which makes steps longer and the share smaller"
    )
    tables = {f"{recipe}, {CLIPS} clips a step in all": rows, projected: projection(size)}
    show(tables)
    print(f"written to {write('scaling', 'Training by several processes', describe(), found | {'gradient_bytes_001': size}, tables)}")


if __name__ == "__main__":
    main()
