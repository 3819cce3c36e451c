"""Commands that need services are run again for as long as one of those does not answer: a run ends by what a person has to mend, not by outages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.process import Ended, Logger, pause, run
from pipelines.project import Project

SECONDS_BETWEEN_TRIES = 30.0
SERVICES = {"MLflow", "S3", "DVC remote"}


def look(project: Project, logger: Logger, told: Mapping[str, str] = {}) -> tuple[Ended, list[dict[str, Any]]]:  # noqa: B006
    """How `vrt doctor` ended, and what it found; `told` overrides the params, as for the trainer. Whatever is not well is logged."""
    ended = run(["vrt", "doctor", "--json", "--before-preparing"], logger, project.folder, told, answers=True)
    findings = json.loads(ended.answer or "[]")
    for finding in findings:
        (logger.info if finding["state"] == "ok" else logger.warning)("%s", said(finding))
    return ended, findings


def said(finding: Mapping[str, Any]) -> str:
    """A finding in a line."""
    return "; ".join(filter(None, [f"{finding['subject']}: {finding['found']}", finding["remedy"]]))


def unanswered(project: Project, logger: Logger) -> bool:
    """Whether a service that trainings need does not answer."""
    _, findings = look(project, logger)
    return any(finding["state"] == "unavailable" and finding["subject"] in SERVICES for finding in findings)


def through_outages(command: Sequence[str], project: Project, logger: Logger, answers: bool = False) -> Ended:
    """Run a command in the project's folder, and again while it fails and a service does not answer. Raises CommandFailed where all do."""
    while True:
        ended = run(command, logger, project.folder, answers=answers)
        if ended.code == 0 or not unanswered(project, logger):
            return ended.check()
        logger.warning("`%s` needs a service that does not answer; trying again in %.0f s", ended.command, SECONDS_BETWEEN_TRIES)
        pause(SECONDS_BETWEEN_TRIES)
