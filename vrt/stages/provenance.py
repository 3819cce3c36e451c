"""What is needed to get back to a training: code, params, versions of the data, environment. Kept with its run, one folder for each attempt."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

import torch

from vrt.machine import processor
from vrt.observe import log, without_credentials

LARGEST_DIFF = 5_000_000
CODE, CHANGES, ENVIRONMENT = "code.json", "changes.diff", "environment.json"
FILES = ("params.yaml", "dvc.yaml", "dvc.lock")
NO_GIT = "unknown: no git here"
# DVC's settings are no code, and whoever forgets `--local` has keys in them.
THE_CODE = ("--", ":/", ":(top,exclude).dvc/config")


def folder_of(artifacts: str, attempt: int) -> str:
    """Where an attempt's provenance is kept, below the artifacts of its run."""
    return f"{artifacts}/provenance/attempt-{attempt}"


def collect(params: Path) -> dict[str, bytes]:
    """The files that record where this process and its inputs come from, by name. Says in the log what can't be recorded."""
    code = code_here()
    if "commit" not in code:
        log.warning("without git the run records params, environment and data, but not the commit or the changes of the code (%s)", code["version"])
    files = {CODE: json.dumps(code, indent=1).encode(), ENVIRONMENT: json.dumps(environment(), indent=1).encode()}
    if code.get("changed"):
        # As `git apply` wants it, whatever the user's settings make of a diff that people look at.
        plain = ("-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false", "-c", "core.quotePath=true")
        whole = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-relative", "--binary", "--full-index")
        changes = _git(*plain, "diff", *whole, "HEAD", *THE_CODE).encode(errors="surrogateescape")
        if len(changes) <= LARGEST_DIFF:
            files[CHANGES] = changes
        else:
            log.warning("the changes since the commit (%.0f MB) are too large to be recorded with the run; commit them", len(changes) / 1e6)
    sources = {name: Path(name) for name in FILES} | {"params.yaml": params}
    return files | {name: path.read_bytes() for name, path in sources.items() if path.exists()}


def code_here() -> dict:
    """The commit of the code, the branch, whether tracked files differ, which are not tracked, and the remote without any credentials."""
    version = code_version()
    if not _has_git():
        return {"version": version}
    return {
        "version": version,
        "commit": _git("rev-parse", "HEAD").strip(),
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD").strip(),
        "changed": version.endswith("+changes"),
        "untracked": _git("ls-files", "--others", "--exclude-standard", "*.py", "*.yaml").split(),
        "remote": without_credentials(_git("remote", "get-url", "origin", missing="").strip()),
    }


def code_version() -> str:
    """The commit of the code, with "+changes" where the working tree differs; says so where there is no git."""
    if not _has_git():
        return os.environ.get("VRT_CODE_VERSION", NO_GIT)
    return _git("rev-parse", "HEAD").strip() + ("+changes" if _git("status", "--porcelain", "-uno", *THE_CODE) else "")


def code_digest() -> str:
    """A short digest of the code that runs, whatever git knows of it."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict:
    """What else decides the bits: machine, Python, torch, threads, and every installed package."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "packages": dict(sorted((found.metadata["Name"].lower(), found.version) for found in distributions())),
    }


def _has_git() -> bool:
    return bool(_git("rev-parse", "HEAD", missing=""))


def _git(*arguments: str, missing: str | None = None) -> str:
    """What git says of the code at hand; `missing`, where it is given, instead of an error."""
    try:
        ended = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        if missing is None:
            raise
        return missing
    return ended.stdout.decode(errors="surrogateescape")


def differences(before: Mapping[str, bytes], here: Mapping[str, bytes]) -> list[tuple[str, str, str]]:
    """(what, then, here) of everything in two provenances that is not the same; params by their keys, packages by their names."""
    found = []
    for name in (CODE, ENVIRONMENT):
        then, now = (_flat(json.loads(files.get(name, b"{}"))) for files in (before, here))
        keys = [key for key in {**then, **now} if key not in ("untracked", "remote", "branch", "changed", "commit")]
        found += [(key, str(then.get(key, "-")), str(now.get(key, "-"))) for key in keys if then.get(key) != now.get(key)]
    if before.get(CHANGES) != here.get(CHANGES):
        found.append(("changes since the commit", *("recorded" if CHANGES in files else "none" for files in (before, here))))
    for name in FILES:
        then, now = (_flat(_parsed(files.get(name, b""))) for files in (before, here))
        found += [(f"{name}: {key}", str(then.get(key, "-")), str(now.get(key, "-"))) for key in {**then, **now} if then.get(key) != now.get(key)]
    return found


def _parsed(content: bytes):
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(content.decode()) or {}


def _flat(tree, prefix: str = "") -> dict[str, object]:
    if isinstance(tree, list):
        # Of files and outputs: by their names, not by their places.
        named = [(str(item.get("path", i)), item) if isinstance(item, dict) else (None, item) for i, item in enumerate(tree)]
        if any(name is None for name, _ in named):
            return {prefix.removesuffix("."): tree}
        tree = dict(named)
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict | list) else {f"{prefix}{key}": value}
    return flat
