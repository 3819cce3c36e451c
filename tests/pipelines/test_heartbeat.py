"""The automation that finds runs whose machine vanished: kept up to date in a real server."""

import os
from collections.abc import Iterator

import pytest
from prefect.automations import Automation
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines import heartbeat


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
    before.create()
    heartbeat.ensure()
    found = Automation.read(name=heartbeat.NAME)
    # A pod that was told to end leaves its run so, until a worker starts it again.
    assert found.trigger.expect == heartbeat.automation().trigger.expect >= {"prefect.flow-run.AwaitingRetry"}
    heartbeat.ensure()
    assert Automation.read(name=heartbeat.NAME).id == found.id
