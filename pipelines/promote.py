"""The flow `promote`: the alias `champion` goes to a checkpoint that beats the present champion on the same test clips."""

from typing import Literal

from prefect import flow, get_run_logger
from prefect.states import Completed, State

from pipelines.evaluate import Selector
from pipelines.process import run
from pipelines.watch import report
from vrt.lifecycle import EXIT_DONE, EXIT_NOT_BETTER


@flow(name="promote", log_prints=True)
def promote(
    checkpoint: Selector = "best",
    metric: Literal["psnr", "ssim"] = "psnr",
    least_gain: float = 0.0,
    dataset: str | None = None,
    dry_run: bool = False,
) -> State:
    """Measure a checkpoint and the present champion on the same test clips, and make the better one the champion.

    Args:
        checkpoint: latest or best (of the name in params.yaml), or LINEAGE@STEP.
        metric: What decides.
        least_gain: How much better than the champion it must be; a negative number allows going back to an older one.
        dataset: A folder below data/raw/, whose test clips are used; nothing: that of params.yaml.
        dry_run: Only say what would be done.
    """
    logger = get_run_logger()
    chosen = ["--checkpoint", checkpoint, "--metric", metric, f"--least-gain={least_gain}"]
    chosen += [*(["--dataset", dataset] if dataset else []), *(["--dry-run"] if dry_run else [])]
    ended = run(["vrt", "promote", *chosen], logger, answers=True)
    if ended.code not in (EXIT_DONE, EXIT_NOT_BETTER):
        ended.check()
    report(f"```\n{ended.answer.strip()}\n```", "promotion", f"{checkpoint} against the champion", logger)
    return Completed(message="promoted" if ended.code == EXIT_DONE else "not better than the champion: nothing was changed")
