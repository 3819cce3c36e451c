"""Flow runs whose machine vanished are marked Crashed, so that they block no other: an automation in the Prefect server.

A run beats as often as PREFECT_FLOWS_HEARTBEAT_FREQUENCY says (prefect.yaml sets it).
"""

from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture

NAME = "vrt: runs without a heartbeat are crashed"
SILENCE = timedelta(seconds=90)
# The server may have flows of others.
_OURS = {"prefect.resource.role": "flow", "prefect.resource.name": ["train", "evaluate", "promote", "restore"]}
# Of a run that has ended, or waits to be started, nothing is heard either: a pod that was told to end leaves its run in AwaitingRetry.
_SILENT = {
    f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "AwaitingRetry", "Scheduled", "Paused", "Suspended")
}


def ensure() -> None:
    """Create the automation, unless the server has it; bring one of before up to date."""
    wanted = automation()
    try:
        found = Automation.read(name=NAME)
    except ValueError:
        wanted.create()
        return
    if _seen_by(found) != _seen_by(wanted):
        wanted.id = found.id
        wanted.update()


def _seen_by(automation: Automation) -> dict:
    """What it takes for a sign of life, and whose."""
    return automation.trigger.model_dump(include={"expect", "match_related"})


def automation() -> Automation:
    """A run of these flows that beat once and is silent for SILENCE, and has neither ended nor waits to be started, is set to Crashed."""
    beat = "prefect.flow-run.heartbeat"
    trigger = EventTrigger(
        after={beat},
        expect={beat, *_SILENT},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_OURS,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    message = f"No heartbeat for {SILENCE.seconds} s: its machine is gone. The next run of train/vrt goes on from the last registered step."
    return Automation(
        name=NAME,
        description="Written by the flow train/vrt.",
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )
