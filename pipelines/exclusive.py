"""One flow run per training: a second one waits until the first ends or is known to be dead, then gives up."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import StateType
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run

from pipelines.process import Logger
from pipelines.watch import in_spite_of_prefect

# The shortest that Prefect grants: a run that was killed lets go after it.
LEASE_SECONDS = 60.0
PATIENCE_SECONDS = 150.0


class InUse(RuntimeError):
    """Another flow run is at work on the same training."""


@contextmanager
def the_only_run_of(key: str, logger: Logger, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Hold the training `key` while the block runs. Raises InUse, which names the other run, where that is at work all the while.

    This keeps people from waiting for a run that can't work. Two trainers are kept apart by lock and lease, with or without Prefect.
    """
    limit, tag = f"vrt-{key}", f"training:{key}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(limit, 1)
        client.update_flow_run(flow_run.id, tags={*flow_run.tags, tag})
    slot = _slot(limit, 1.0)
    try:
        slot.__enter__()
    except TimeoutError:
        others = _runs_of(tag)
        logger.warning("%s trains %s already; waiting %.0f s for it to end, or to be found dead", others, key, patience)
        slot = _slot(limit, patience)
        try:
            slot.__enter__()
        except TimeoutError:
            raise InUse(f"{others} trains {key} already, and one training can have one run only: cancel that one, or wait for it") from None
    try:
        yield
    finally:
        with in_spite_of_prefect("that this run let go of its training", logger):
            slot.__exit__(None, None, None)


def _slot(limit: str, patience: float):
    # An outage of Prefect must not end the training that holds it.
    return concurrency(limit, timeout_seconds=patience, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False)


def _runs_of(tag: str) -> str:
    """The other runs that have the tag and are at work, by name."""
    at_work = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), state=at_work))
    names = [run.name for run in runs if str(run.id) != flow_run.id]
    return f"flow run {' and '.join(names)}" if names else "another flow run"
