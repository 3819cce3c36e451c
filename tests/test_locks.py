"""The lock files: what runs has all that it needs, and nothing that only tests do."""

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
# Where torch is the CUDA build, these come with it; the lock is for every build.
TORCHS_OWN = ("nvidia-", "cuda-", "triton")


def locked(name: str) -> set[str]:
    """The packages of a lock file that are for this machine."""
    found = [Requirement(line) for line in (PROJECT / name).read_text().splitlines()]
    return {canonicalize_name(one.name) for one in found if one.marker is None or one.marker.evaluate()}


def needed(by: Iterable[str]) -> set[str]:
    """The packages that requirements ask for on this machine, and what those need in turn, by what is installed."""
    waiting = [(Requirement(line), {""}) for line in by]
    found: dict[str, set[str]] = {}
    while waiting:
        one, extras = waiting.pop()
        if one.marker is not None and not any(one.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = canonicalize_name(one.name)
        wanted = {"", *one.extras}
        if name.startswith(TORCHS_OWN) or wanted <= found.get(name, set()):
            continue
        found.setdefault(name, set()).update(wanted)
        waiting += [(Requirement(line), wanted) for line in requires(name) or []]
    return set(found)


def test_they_have_what_is_needed_and_no_more():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    runs, tests = project["dependencies"], project["optional-dependencies"]["dev"]
    assert needed(runs) == locked("requirements.lock")
    assert needed([*runs, *tests]) == locked("requirements.lock") | locked("requirements-dev.lock")


def test_no_package_is_in_both_and_each_has_one_exact_version():
    lines = [line for name in ("requirements.lock", "requirements-dev.lock") for line in (PROJECT / name).read_text().splitlines()]
    assert not [line for line in lines if not re.match(r"[a-z0-9-]+==[^=,*\s]+( ; .+)?$", line)]
    assert not locked("requirements.lock") & locked("requirements-dev.lock")
