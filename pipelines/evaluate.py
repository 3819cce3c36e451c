"""The flow `evaluate`: any registered checkpoint on any test set."""

from typing import Annotated

from prefect import flow, get_run_logger
from pydantic import Field

from pipelines.process import DVC, run
from pipelines.project import PULL_RAW_DATA
from pipelines.watch import report

Selector = Annotated[str, Field(min_length=1)]


@flow(name="evaluate", log_prints=True)
def evaluate(checkpoint: Selector = "latest", dataset: str | None = None) -> None:
    """Measure a checkpoint on test clips; the results are entered into its run and its version in MLflow, too.

    Args:
        checkpoint: latest, best or champion (of the name in params.yaml), LINEAGE@STEP, or a file of weights.
        dataset: A folder below data/raw/, whose test clips are used; nothing: that of params.yaml.
    """
    logger = get_run_logger()
    run([*DVC, *PULL_RAW_DATA], logger).check()
    chosen = ["--dataset", dataset] if dataset else []
    ended = run(["vrt", "evaluate", "--checkpoint", checkpoint, *chosen], logger, answers=True).check()
    report(f"```\n{ended.answer.strip()}\n```", "evaluation", f"{checkpoint} on {dataset or 'the data set of params.yaml'}", logger)
