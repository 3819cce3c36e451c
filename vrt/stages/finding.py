"""What `vrt doctor` says of one thing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was found of one thing that a training needs, and how to mend it."""

    subject: str
    state: Literal["ok", "warning", "wrong", "unavailable"]
    """A training starts in spite of a warning; `unavailable` may mend itself."""
    found: str
    remedy: str = ""
    """Whatever is not ok has one."""
