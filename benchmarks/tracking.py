"""What MLflow costs a training: sending the metrics of 10,000 steps, and finding the newest registered step among many.

`python -m benchmarks.tracking` starts local services of its own (or uses those of MLFLOW_TRACKING_URI and AWS_ENDPOINT_URL), prints tables, and
writes benchmarks/results/tracking-MACHINE.json and .md. Takes about four minutes.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from benchmarks.local import local_services
from benchmarks.machine import describe
from benchmarks.report import show, write
from vrt.checkpoint.curator import Curator
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.data.sampler import Batch
from vrt.machine import MachineUse
from vrt.params import load_params
from vrt.training.loop import take_step
from vrt.training.session import build_state

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"
# As a registered checkpoint has.
AS_MANY_TAGS = {
    **dict.fromkeys(("digest", "data_version", "code_version"), "0" * 64),
    **dict.fromkeys(("val_psnr", "val_ssim", "train_loss"), "30.0625"),
    **dict.fromkeys(("bytes", "attempt", "recipe", "dvc_data"), "24832896"),
}
AIM_OF_STEP, AIM_SECONDS, AIM_VERSIONS = 0.01, 0.5, 500


def seconds_of_step() -> float:
    """A training step of the quickstart, on as many threads as it takes."""
    params = load_params(QUICKSTART)
    torch.set_num_threads(params.train.threads)
    state = build_state(params, torch.device("cpu"))
    shape = (params.train.batch_size, params.train.frames, 3, params.train.crop, params.train.crop)
    batch = Batch(torch.rand(shape), torch.rand(shape))
    taken = []
    for step in range(1, 8):
        started = time.perf_counter()
        take_step(params, state, step, batch)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def metrics(registry: Curator, folder: CheckpointFolder, steps: int) -> dict[str, float]:
    """Send the metrics of so many steps, as a training does: seconds that its thread is held up, and of the processor behind it, in all."""
    publisher = Publisher(folder, S3Store(registry.checkpoints_address), registry)
    publisher.start()
    machine = MachineUse(folder.path, torch.device("cpu"))
    held_up, processor = 0.0, time.process_time()
    for step in range(1, steps + 1):
        started = time.perf_counter()
        publisher.send({"step": step, "train/loss": 1 / step, "train/lr": 1e-3, "train/steps_per_s": 3.0} | machine.sample())
        held_up += time.perf_counter() - started
    started = time.perf_counter()
    missing = publisher.finish(600)
    assert not missing, missing
    return {"held_up_s": held_up, "processor_s": time.process_time() - processor, "until_sent_s": time.perf_counter() - started}


def lookups(registry: Curator, sizes: list[int], rounds: int) -> dict[int, tuple[float, float]]:
    """Median seconds to find the newest registered step, and to list them all, by how many are registered."""
    client = MlflowClient()
    client.create_registered_model(registry.lineage.model)
    found, made = {}, 0
    for size in sizes:
        for step in range(made + 1, size + 1):
            tags = AS_MANY_TAGS | {"step": str(step), "lineage": registry.lineage.id}
            source = f"{registry.checkpoints_address}/{step:08d}"
            client.create_model_version(registry.lineage.model, source, run_id=registry.run_id, tags=tags, await_creation_for=None)
        made = size
        latest, listed = [], []
        for _ in range(rounds):
            started = time.perf_counter()
            newest = registry.latest()
            latest.append(time.perf_counter() - started)
            everything = registry.registered()
            listed.append(time.perf_counter() - started - latest[-1])
            assert newest and newest.step == max(everything) == size
        found[size] = statistics.median(latest), statistics.median(listed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000, help="steps whose metrics are sent (default: 10000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often the newest step is looked up (default: 5)")
    args = parser.parse_args()
    with local_services() as scratch:
        registry = Curator(Lineage("benchmark", f"{time.time_ns():x}", {}))
        registry.open({}, {})
        folder = CheckpointFolder(scratch / "checkpoints")
        folder.prepare()
        step = seconds_of_step()
        sent: dict[str, Any] = metrics(registry, folder, args.steps) | {"step_s": step, "steps": args.steps}
        looked = lookups(registry, [10, 50, 100, 500, 1000], args.rounds)
    share, processor = (sent[key] / args.steps / step for key in ("held_up_s", "processor_s"))
    rows = [
        ("", "measured", "judged"),
        ("a training step of the quickstart", f"{1e3 * step:.0f} ms", ""),
        (f"held up by the metrics of {args.steps} steps", f"{1e6 * sent['held_up_s'] / args.steps:.1f} us a step", f"{share:.4%} of it"),
        (
            "the processor's time behind it",
            f"{1e6 * sent['processor_s'] / args.steps:.0f} us a step",
            f"{processor:.2%} of it (aim: {AIM_OF_STEP:.0%})",
        ),
        ("all sent after the last step", f"{sent['until_sent_s']:.1f} s", ""),
    ]
    growth = [("registered checkpoints", "newest step found in", "all listed in", "judged")]
    for size, (latest, listed) in looked.items():
        growth.append((str(size), f"{1e3 * latest:.0f} ms", f"{1e3 * listed:.0f} ms", f"aim: {AIM_SECONDS} s" if size == AIM_VERSIONS else ""))
    tables = {"sending metrics": rows, "finding the newest registered step (SQLite)": growth}
    show(tables)
    print(f"written to {write('tracking', 'What MLflow costs a training', describe(), sent | {'lookup_s': looked}, tables)}")


if __name__ == "__main__":
    main()
