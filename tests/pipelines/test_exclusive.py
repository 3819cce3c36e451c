"""One flow run per training, asked of a real Prefect server."""

import logging
import threading

import pytest
from prefect import flow
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines.exclusive import InUse, the_only_run_of

log = logging.getLogger("test")


@pytest.fixture
def server(services):
    with temporary_settings({PREFECT_API_URL: services["PREFECT_API_URL"]}):
        yield


@flow
def train(key: str, patience: float = 1.0) -> str:
    with the_only_run_of(key, log, patience):
        return flow_run.name


def test_a_second_run_is_told_which_one_is_at_work_and_another_training_is_not_held_up(server):
    @flow
    def first() -> str:
        with the_only_run_of("tiny-1", log):
            with pytest.raises(InUse, match=f"flow run {flow_run.name} trains tiny-1 already, .* cancel that one, or wait for it"):
                train("tiny-1")
            train("tiny-2")
        return train("tiny-1")

    assert first()


def test_a_second_run_goes_on_as_soon_as_the_first_lets_go(server):
    let_go = threading.Event()

    @flow
    def first() -> None:
        with the_only_run_of("tiny-3", log):
            second.start()
            let_go.wait(2)

    done: list[str] = []
    second = threading.Thread(target=lambda: done.append(in_server("tiny-3")))

    def in_server(key: str) -> str:
        with temporary_settings(address):
            return train(key, patience=60.0)

    address = {PREFECT_API_URL: PREFECT_API_URL.value()}
    first()
    second.join(90)
    assert done
