"""The automation that finds runs whose machine vanished: kept up to date in a real server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.automations import Automation
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import RelatedResource, Resource
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from pipelines import heartbeat

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def server(services, monkeypatch) -> Iterator[None]:
    """A server that this process asks, in which the automation has a name of this test's own."""
    monkeypatch.setattr(heartbeat, "NAME", f"{heartbeat.NAME} ({os.getpid()})")
    with temporary_settings({PREFECT_API_URL: services["PREFECT_API_URL"]}):
        yield
        Automation.read(name=heartbeat.NAME).delete()


def test_one_of_before_is_brought_up_to_date_and_another_start_changes_nothing(server):
    before = heartbeat.automation()
    before.trigger.expect = {"prefect.flow-run.heartbeat"}
    before.trigger.match_related = {}
    before.create()
    heartbeat.ensure()
    found, now = Automation.read(name=heartbeat.NAME), heartbeat.automation().trigger
    # A pod that was told to end leaves its run so, until a worker starts it again.
    assert found.trigger.expect == now.expect >= {"prefect.flow-run.AwaitingRetry"}
    assert found.trigger.match_related == now.match_related
    heartbeat.ensure()
    assert Automation.read(name=heartbeat.NAME).id == found.id


def test_it_sees_the_flows_of_the_deployments_and_no_others():
    deployed = YAML(typ="safe").load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
    flows = {deployment["entrypoint"].split(":")[1] for deployment in deployed}
    trigger = EventTrigger.model_validate(heartbeat.automation().trigger.model_dump(mode="json"))
    run = Resource({"prefect.resource.id": "prefect.flow-run.1"})

    def sees(flow: str) -> bool:
        labels = {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": flow}
        return trigger.covers_resources(run, [RelatedResource(labels)])

    assert {flow for flow in (*flows, "nightly-report") if sees(flow)} == flows
