"""The flow `train`: fetch what is missing, run the stages that are stale, keep the result in the remote."""

from prefect import flow, get_run_logger, task

from pipelines.process import run_in_project


@task(name="pull data")
def pull() -> None:
    # Only what people added themselves. `dvc pull` of everything would put the outputs of dvc.lock in place of newer ones.
    run_in_project(["dvc", "pull", "--allow-missing", "--recursive", "data/raw"], get_run_logger())


@task(name="prepare, train, evaluate")
def reproduce() -> None:
    # --pull: what another machine made already and nothing changed since is fetched, not made again.
    run_in_project(["dvc", "repro", "--pull"], get_run_logger())


@task(name="push data and models")
def push() -> None:
    run_in_project(["dvc", "push"], get_run_logger())


@flow(name="train", log_prints=True)
def train() -> None:
    """Train VRT by the project's params.yaml; run again after any interruption, it goes on from the last registered step."""
    pull()
    reproduce()
    push()
