"""Commands that need services are run again for as long as one of those does not answer: a run ends by what a person has to mend, not by outages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.process import Ended, Logger, pause, run
from pipelines.project import Project
from pipelines.watch import Watch
from vrt.lifecycle import EXIT_UNAVAILABLE

SECONDS_BETWEEN_TRIES = 30.0
SERVICES = {"MLflow", "S3", "DVC remote"}

Findings = Sequence[Mapping[str, Any]]


def look(project: Project, logger: Logger, watch: Watch, told: Mapping[str, str] = {}) -> tuple[Ended, Findings]:  # noqa: B006
    """How `vrt doctor` ended, and what it found; `told` overrides the params, as for the trainer. Whatever is not well is logged."""
    ended = run(["vrt", "doctor", "--json", "--before-preparing"], logger, project.folder, told, watch.interruption, answers=True)
    findings = json.loads(ended.answer or "[]")
    for finding in findings:
        (logger.info if finding["state"] == "ok" else logger.warning)("%s", said(finding))
    return ended, findings


def said(finding: Mapping[str, Any]) -> str:
    """A finding in a line."""
    return "; ".join(filter(None, [f"{finding['subject']}: {finding['found']}", finding["remedy"]]))


def state_of_services(findings: Findings) -> str:
    """wrong: one needs a person, such as for its rights; unavailable: one does not answer; ok."""
    states = {finding["state"] for finding in findings if finding["subject"] in SERVICES}
    return next((state for state in ("wrong", "unavailable") if state in states), "ok")


def through_outages(command: Sequence[str], project: Project, logger: Logger, folder: Path | None = None, answers: bool = False) -> Ended:
    """Run a command in the project's folder (or another), and again while it fails and a service does not answer.

    Raises CommandFailed where it fails for another reason.
    """
    may_be_over = True
    with Watch(project.status, logger) as watch:
        while True:
            ended = run(command, logger, folder or project.folder, interruption=watch.interruption, answers=answers)
            # Of DVC's own failures alone nobody knows what they are for.
            told = ended.of_stage or command[0] == "vrt"
            if ended.code == 0 or (told and ended.code != EXIT_UNAVAILABLE):
                return ended.check()
            found = state_of_services(look(project, logger, watch)[1])
            if found == "wrong" or (found == "ok" and not may_be_over):
                return ended.check()
            # By the time one looks: believed once.
            may_be_over = may_be_over and found != "ok"
            seconds = SECONDS_BETWEEN_TRIES if found == "unavailable" else 0.0
            logger.warning("`%s` failed, for want of a service it seems; trying again in %.0f s", ended.command, seconds)
            pause(seconds, watch.interruption)
