"""This process with a clock that is off. A test can't set the machine's own, so what reads it to sign and to compare is told another time."""

import time
from datetime import UTC, datetime, timedelta

import pytest


def set_clock(patch: pytest.MonkeyPatch, seconds_ahead: float) -> None:
    """Requests to S3 are signed with a clock so far ahead, and the answers' times compared with it."""
    patch.setattr("botocore.auth.get_current_datetime", lambda: datetime.now(UTC) + timedelta(seconds=seconds_ahead))
    patch.setattr("vrt.checkpoint.answers.now", lambda: time.time() + seconds_ahead)
