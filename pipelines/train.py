"""The flow `train`: fetch what is missing, train through every interruption, evaluate, and keep the results in the remote."""

import json
import platform
import time
from collections.abc import Mapping
from contextlib import nullcontext
from enum import StrEnum
from typing import Annotated, Any

from prefect import Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Cancelled, Crashed, State
from pydantic import Field

from pipelines.attempts import LONGEST_PAUSE, Attempt, End, decide, end_of, table
from pipelines.exclusive import InUse, the_only_run_of
from pipelines.outages import SECONDS_BETWEEN_TRIES, look, said, state_of_services, through_outages
from pipelines.process import DVC, PROJECT, LauncherGone, pause, run
from pipelines.project import PULL_RAW_DATA, RECIPES, Project, make, plan
from pipelines.summary import closing_page
from pipelines.watch import NotWanted, Watch, report
from vrt.lifecycle import EXIT_DONE, EXIT_UNAVAILABLE, MACHINES, MEET, PROCESSES, RESUME

Recipe = StrEnum("Recipe", {path.stem: path.stem for path in sorted(RECIPES.glob("*.yaml"))})
MEETING_POINT = r"^(\S+:[0-9]+)?$"
RESUME_POLICY = r"^(auto|must|never|[0-9]+|fork [A-Za-z0-9][A-Za-z0-9._-]*@[0-9]+)$"

# What would be done is not worth more waiting for a run that is at work.
SECONDS_TO_REHEARSE = 1.0


class GivenUp(RuntimeError):
    """The training can't be finished without a person; the message says why."""


def may_come_back(task: Task, task_run: TaskRun, state: State) -> bool:
    """Whether what a task failed of is worth another try: not where the run is to end, since the worker is gone or it was cancelled."""
    return not isinstance(state.result(raise_on_failure=False), LauncherGone | NotWanted)


@task(name="see that all is there", cache_policy=NO_CACHE)
def see_that_all_is_there(project: Project, told: Mapping[str, str]) -> None:
    """Before data are fetched and packed, and any hour of a GPU is spent. Raises GivenUp, with what is wrong and how to mend it."""
    logger = get_run_logger()
    with Watch(project.status, logger) as watch:
        ended, findings = look(project, logger, watch, told)
        # Services that don't answer, and memory that another trainer still has, are waited for; all else needs a person.
        while ended.code == EXIT_UNAVAILABLE:
            logger.warning("looking again in %.0f s", SECONDS_BETWEEN_TRIES)
            pause(SECONDS_BETWEEN_TRIES, watch.interruption)
            ended, findings = look(project, logger, watch, told)
    if ended.code != EXIT_DONE:
        wrong = [said(finding) for finding in findings if finding["state"] == "wrong"]
        raise GivenUp("`vrt doctor` finds that this training can't begin here:\n" + "\n".join(wrong or ended.tail))


@task(name="pull data", cache_policy=NO_CACHE)
def pull(project: Project) -> None:
    """Fetch raw data that people added."""
    # Into the project's own folder, which workspaces look into.
    through_outages([*DVC, *PULL_RAW_DATA], project, get_run_logger(), PROJECT)


@task(name="prepare data", cache_policy=NO_CACHE)
def prepare(project: Project) -> None:
    """Pack the clips, where that is stale."""
    # --pull: what another machine made already and nothing changed since is fetched, not made again.
    through_outages([*DVC, "repro", "--pull", "prepare"], project, get_run_logger())


@task(name="train", cache_policy=NO_CACHE)
def train_to_the_end(project: Project, told: Mapping[str, str], retry_pause: float) -> list[Attempt]:
    """Train, as often as it takes; what `told` overrides of the params is the trainer's environment.

    Raises GivenUp where starting again would be in vain.
    """
    logger = get_run_logger()
    attempts: list[Attempt] = []
    # A policy other than auto asks for something to be trained, whatever DVC believes to be up to date.
    command = [*DVC, "repro", *(["--single-item", "--force"] if RESUME in told else ["--pull"]), "train"]
    while not attempts or attempts[-1].end is not End.DONE:
        with Watch(project.status, logger) as watch:
            started = time.time()
            ended = run(command, logger, project.folder, told, watch.interruption)
            code = ended.code
            if code > 0 and not ended.of_stage and state_of_services(look(project, logger, watch)[1]) == "unavailable":
                # DVC itself failed, for want of its remote: the trainer was not even started, or what it made not kept.
                code = EXIT_UNAVAILABLE
            attempts.append(Attempt(end_of(code), code, started, watch.status(), "\n".join(ended.tail)))
            if attempts[-1].end is End.DONE:
                break
            if attempts[-1].code < 0:
                # It could not say so itself.
                run(["vrt", "checkpoints", "settle"], logger, project.folder)
            verdict = decide(attempts, retry_pause)
            if verdict.pause is None:
                report(table(attempts), "attempts", "The attempts at this training", logger)
                raise GivenUp(verdict.why)
            logger.warning("attempt %d: %s; starting again in %.0f s", len(attempts), verdict.why, verdict.pause)
            pause(verdict.pause, watch.interruption)
    return attempts


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(project: Project) -> None:
    """Measure the trained model on the test clips, where that is stale."""
    through_outages([*DVC, "repro", "--pull", "evaluate"], project, get_run_logger())


@task(name="verify what is registered", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=may_come_back)
def verify(project: Project) -> list[dict[str, Any]]:
    """Read the newest checkpoint back from the store, byte by byte. Returns all checkpoints of the training."""
    logger = get_run_logger()
    listed = through_outages(["vrt", "checkpoints", "list", "--json"], project, logger, answers=True)
    checkpoints = json.loads(listed.answer)["checkpoints"]
    newest = max(row["step"] for row in checkpoints if row["registered"])
    # A machine that found nothing left to train may have older ones only, and lacks this one.
    for action in ("fetch", "verify"):
        through_outages(["vrt", "checkpoints", action, str(newest)], project, logger)
    return checkpoints


@task(name="push data and models", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10, retry_condition_fn=may_come_back)
def push(project: Project) -> None:
    """Keep data and model in DVC's remote."""
    through_outages([*DVC, "push"], project, get_run_logger())


@flow(name="train", log_prints=True)
def train(
    recipe: Recipe | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006
    resume: Annotated[str, Field(pattern=RESUME_POLICY)] = "auto",
    processes: Annotated[int, Field(ge=0)] = 0,
    machines: Annotated[int, Field(ge=1)] = 1,
    meet: Annotated[str, Field(pattern=MEETING_POINT)] = "",
    retry_pause: Annotated[float, Field(ge=0, le=LONGEST_PAUSE)] = 20.0,
    dry_run: bool = False,
) -> State | None:
    """Train VRT by the project's params.yaml, or by a recipe and values of your own; run again after any interruption, it goes on.

    With a recipe or overrides it trains in a workspace of its own below .vrt/workspaces/, and leaves the project's files alone.
    Raises GivenUp where only a person can mend what stops it.

    Args:
        recipe: One of recipes/, instead of the project's params.yaml.
        overrides: Other values of params, by dotted key, such as {"name": "wide", "train.total_steps": 400}.
        resume: auto (as the params say: go on from the newest registered step, else begin), must (go on, or fail), never (begin anew),
            a step to go back to, or "fork LINEAGE@STEP" (branch off another training).
        processes: How many processes train on the machine, one per GPU; 0: as the params say. It is the same training with any number.
        machines: How many machines train together: start as many runs, alike, each of which a worker on another machine takes.
        meet: Where the machines meet, as HOST:PORT: a free port of one of them that all others reach.
        retry_pause: Seconds before a training that crashed is started again; they grow while it registers nothing new.
        dry_run: Only say what would be done.
    """
    logger = get_run_logger()
    if (machines > 1) != bool(meet):
        raise GivenUp(f"machines {machines}, meet {meet!r}: expected both or neither; all runs of a training are told alike")
    if resume.startswith("fork"):
        # A fork is a training of its own: every stage has to know it, not the trainer alone.
        overrides, resume = overrides | {"checkpoints.resume": resume}, "auto"
    project = plan(recipe, overrides)
    told = {RESUME: resume} if resume != "auto" else {}
    told |= {PROCESSES: str(processes)} if processes else {}
    told |= {MACHINES: str(machines), MEET: meet} if meet else {}
    try:
        # Machines that train together have a run each.
        key = f"{project.key} on {platform.node()}" if meet else project.key
        if dry_run:
            with nullcontext() if project.folder == PROJECT else the_only_run_of(key, logger, SECONDS_TO_REHEARSE):
                make(project)
            # Not worth waiting for what another run does with DVC for hours.
            run(["dvc", *PULL_RAW_DATA], logger).check()
            report(rehearsal(project, resume), "plan", "What this run would do", logger)
            return None
        # One run at a time from here on: it writes the params that others would be reading, and wants the memory that their trainer has.
        with the_only_run_of(key, logger):
            make(project)
            see_that_all_is_there(project, told)
            pull(project)
            prepare(project)
            attempts = train_to_the_end(project, told, retry_pause)
            evaluate(project)
            report(closing_page(project.folder, attempts, verify(project)), "result", "What came of the training", logger)
            push(project)
    except (InUse, NotWanted) as reason:
        return Cancelled(message=str(reason))
    except LauncherGone as reason:
        return Crashed(message=str(reason))
    return None


def rehearsal(project: Project, resume: str) -> str:
    """What a run would do, as a page in markdown. Trains nothing."""
    logger = get_run_logger()
    stale = run(["dvc", "status"], logger, project.folder, answers=True).check().answer
    known = run(["vrt", "checkpoints", "list", "--json"], logger, project.folder, answers=True)
    # Before its data are prepared a training has no lineage.
    listed = json.loads(known.answer) if known.code == 0 else {"lineage": f"a new training {project.params.name}", "checkpoints": []}
    registered = [row["step"] for row in listed["checkpoints"] if row["registered"]]
    newest = f"step {max(registered)} is the newest registered" if registered else "nothing is registered yet"
    return "\n".join(
        [
            f"**{listed['lineage']}**: {newest}. It would train up to step {project.params.train.total_steps} in `{project.folder}`, "
            f"with resume policy `{resume}`.",
            "",
            "What DVC finds stale:",
            "",
            "```",
            stale.strip(),
            "```",
        ]
    )
