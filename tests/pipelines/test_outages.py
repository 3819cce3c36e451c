"""When a command that failed is worth another try; with real services that go away: test_killed.py."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from pipelines import outages
from pipelines.process import CommandFailed, Ended
from vrt.lifecycle import EXIT_UNAVAILABLE

OK, DOWN, REFUSED = "ok", "unavailable", "wrong"
DONE, FAILED = Ended("c", 0, ()), Ended("c", 255, ("no endpoint",))
REFUSED_BY_STAGE, STAGE_LACKED_SERVICE = Ended("c", 2, (), of_stage=True), Ended("c", EXIT_UNAVAILABLE, (), of_stage=True)


def found(mlflow: str, s3: str = OK) -> list[dict[str, str]]:
    return [{"subject": "memory", "state": DOWN}, {"subject": "MLflow", "state": mlflow}, {"subject": "S3", "state": s3}]


@pytest.mark.parametrize(
    "ends, looks, succeeds",
    [
        ([DONE], [], True),
        ([FAILED] * 5 + [DONE], [found(OK, DOWN)] * 5, True),
        # The outage is over before anybody looks.
        ([FAILED, DONE], [found(OK)], True),
        ([STAGE_LACKED_SERVICE, FAILED, DONE], [found(DOWN, DOWN), found(OK)], True),
        ([FAILED, FAILED], [found(OK)] * 2, False),
        # Where MLflow refuses, nobody knows where S3 is; a person has to mend the former.
        ([FAILED], [found(REFUSED, DOWN)], False),
        ([REFUSED_BY_STAGE], [], False),
    ],
)
def test_it_is_tried_again_as_long_as_a_service_does_not_answer(ends, looks, succeeds: bool, monkeypatch):
    left, seen = iter(ends), iter(looks)
    monkeypatch.setattr(outages, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(outages, "Watch", lambda status, logger: nullcontext(SimpleNamespace(interruption=lambda: None)))
    monkeypatch.setattr(outages, "run", lambda *_, **__: next(left))
    monkeypatch.setattr(outages, "look", lambda *_: (DONE, next(seen)))
    project = SimpleNamespace(folder=None, status=None)
    if succeeds:
        assert outages.through_outages(["c"], project, logging.getLogger()) is DONE
    else:
        with pytest.raises(CommandFailed):
            outages.through_outages(["c"], project, logging.getLogger())
    assert next(left, None) is next(seen, None) is None, "all that was to come was asked for"


def test_of_our_own_commands_the_code_tells(monkeypatch):
    ends = [Ended("c", EXIT_UNAVAILABLE, ()), Ended("c", 1, ("damaged",))]
    monkeypatch.setattr(outages, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(outages, "Watch", lambda status, logger: nullcontext(SimpleNamespace(interruption=lambda: None)))
    monkeypatch.setattr(outages, "run", lambda *_, **__: ends.pop(0))
    monkeypatch.setattr(outages, "look", lambda *_: (DONE, found(DOWN)))
    with pytest.raises(CommandFailed, match="damaged"):
        outages.through_outages(["vrt", "checkpoints", "verify"], SimpleNamespace(folder=None, status=None), logging.getLogger())
    assert ends == []
