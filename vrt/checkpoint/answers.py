"""What the answers of an S3 server mean: which of our errors one that refuses is, and what time it is there."""

from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time as now
from typing import Any

from vrt.checkpoint.errors import ClockRefused, Missing, StoreRefuses, StoreUnavailable

MOST_SECONDS_ACCEPTED = 900
"""S3 refuses requests that were signed further from its own time."""


def status(error: BaseException | None) -> int:
    """The HTTP status that an error of botocore carries; 0: none."""
    return getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def seconds_ahead(answer: Mapping[str, Any]) -> float | None:
    """How far this machine's clock is ahead of the server's that gave the answer; None: it did not tell its time."""
    told = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    return now() - parsedate_to_datetime(told).timestamp() if told else None


def as_ours(address: str, error: BaseException) -> Exception:
    """What an error that carries the server's answer is to be raised as."""
    code, ahead = error.response.get("Error", {}).get("Code"), seconds_ahead(error.response)
    if code in ("NoSuchKey", "404"):
        return Missing(f"{address}: there is no such object in the store ({error})")
    # No verdict on the checkpoint.
    if status(error) >= 500:
        return StoreUnavailable(_refused(address, error))
    # Not by the code alone: the answer to a HEAD request has no room for it, and rclone calls a clock that is behind AccessDenied.
    if code == "RequestTimeTooSkewed" or (ahead is not None and abs(ahead) > MOST_SECONDS_ACCEPTED):
        off = f", which is {ahead:+.0f} s off the store's" if ahead is not None else ""
        return ClockRefused(f"{address}: the store refused this machine's clock{off} ({error}); synchronise both by NTP")
    return StoreRefuses(_refused(address, error))


def _refused(address: str, error: BaseException) -> str:
    return f"{address}: the store refused ({error}); check the credentials, the bucket and its policy"
