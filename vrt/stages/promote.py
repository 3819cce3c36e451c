"""`vrt promote`: the alias `champion` goes to a checkpoint that beats the present one on the same test clips."""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vrt.lifecycle import EXIT_DONE, EXIT_NOT_BETTER

if TYPE_CHECKING:
    from vrt.params import Params

METRICS = ("psnr", "ssim")


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate becomes the champion, and why."""

    promote: bool
    candidate: str
    champion: str | None
    metric: str
    measured: float
    to_beat: float | None
    """The champion's; None: there is none."""
    reason: str


def judge(candidate: str, measured: float, champion: str | None, to_beat: float | None, metric: str, least_gain: float) -> Verdict:
    """The candidate must be better than the champion by `least_gain`; where there is no champion, it only has to be sound."""
    if champion is None or to_beat is None:
        return Verdict(True, candidate, None, metric, measured, None, "there was no champion")
    if candidate == champion:
        return Verdict(False, candidate, champion, metric, measured, to_beat, "it is the champion already")
    gain = measured - to_beat
    enough = gain > 0 if least_gain == 0 else gain >= least_gain
    asked = "any gain" if least_gain == 0 else f"a gain of {least_gain:+g}"
    return Verdict(enough, candidate, champion, metric, measured, to_beat, f"its gain is {gain:+.4f}, asked was {asked}")


def check_same_clips(candidate: str, ours: "Params", champion: str, theirs: "Params") -> None:
    """Raises ValueError where two checkpoints are measured on clips that were degraded in different ways: the easier ones would win."""
    found, expected = _as_tested(ours), _as_tested(theirs)
    if found != expected:
        raise ValueError(
            f"{candidate}: it restores {json.dumps(found)}, the champion {champion} {json.dumps(expected)}; results on different clips don't "
            "compare: give such a training a `name` of its own, or take the alias champion away on the model's page in MLflow to begin anew"
        )


def _as_tested(params: "Params") -> dict[str, Any]:
    """What makes the input of test clips, beside the data set."""
    made = params.degradation.model_dump(mode="json", exclude={"sigma_min", "sigma_max"})
    # Frames in between are made of so many, and only where there are as many.
    return made | ({"given frames": params.network.img_size[0]} if made["kind"] == "between" else {})


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `vrt promote`."""
    told = "make a checkpoint the champion, if it beats the present one on the same test clips"
    parser = subparsers.add_parser(
        "promote", help=told, description=f"{told}. Exit code 0: it is the champion (or would be); {EXIT_NOT_BETTER}: it is not better."
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    parser.add_argument("--checkpoint", default="best", metavar="CHECKPOINT", help="latest, best, LINEAGE@STEP or RUN@STEP (default: best)")
    parser.add_argument("--metric", choices=METRICS, default="psnr", help="what decides (default: psnr)")
    parser.add_argument("--least-gain", type=float, default=0.0, metavar="GAIN", help="how much better it must be; a negative number goes back")
    parser.add_argument("--dataset", metavar="NAME", help="a folder below data/raw/, for its test clips (default: that of the params file)")
    parser.add_argument("--dry-run", action="store_true", help="measure and judge, but leave the champion where it is")
    parser.add_argument("--json", action="store_true", help="the verdict for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Execute the command. Raises ValueError or RuntimeError, whose messages are for the user."""
    from vrt.checkpoint.errors import CheckpointError
    from vrt.checkpoint.registry import CHAMPION
    from vrt.checkpoint.resume import State
    from vrt.observe import log
    from vrt.services import load_environment
    from vrt.stages.checkpoints import verify_all
    from vrt.stages.evaluate import measure_checkpoint
    from vrt.stages.selector import Chosen, choose

    os.environ.update(load_environment())

    def measured(chosen: Chosen) -> float:
        return measure_checkpoint(chosen, args.dataset).metrics()[args.metric]

    candidate = choose(args.checkpoint, args.params)
    if candidate.desk is None or candidate.candidate is None or not candidate.candidate.registered:
        raise CheckpointError(f"{candidate.name}: only a registered checkpoint can become the champion; `vrt train` registers them")
    registry, step = candidate.desk.registry, candidate.candidate.step
    reigning = registry.led_to(CHAMPION)
    champion = f"{reigning[0]}@{reigning[1]}" if reigning else None
    to_beat = None
    if champion and champion != candidate.name:
        present = choose(champion, args.params)
        check_same_clips(candidate.name, candidate.params, champion, present.params)
        to_beat = measured(present)
    found = measured(candidate)
    verdict = judge(candidate.name, found, champion, found if champion == candidate.name else to_beat, args.metric, args.least_gain)
    if verdict.promote and not args.dry_run:
        (kept,) = verify_all(candidate.desk, [candidate.candidate])
        if kept.store.state is not State.HEALTHY:
            raise CheckpointError(f"{candidate.name}: it is not healthy in the store; mend it with `vrt checkpoints repair {step}`, then promote it")
        registry.tag(step, {"champion_since": datetime.now(UTC).isoformat(timespec="seconds"), "champion_before": champion or "none"})
        registry.crown(step)
        log.info("%s is the champion of %s now", candidate.name, registry.lineage.model)
    print(json.dumps(asdict(verdict), indent=2)) if args.json else _show(verdict, args.dry_run)
    return EXIT_DONE if verdict.promote or champion == candidate.name else EXIT_NOT_BETTER


def _show(verdict: Verdict, dry_run: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "checkpoint", verdict.metric)
    table.add_row("candidate", verdict.candidate, f"{verdict.measured:.4f}")
    table.add_row("champion", verdict.champion or "-", "-" if verdict.to_beat is None else f"{verdict.to_beat:.4f}")
    Console().print(table)
    done = "would be promoted" if dry_run else "promoted"
    Console().print(f"{verdict.candidate} {done if verdict.promote else 'not promoted'}: {verdict.reason}", soft_wrap=True, markup=False)
