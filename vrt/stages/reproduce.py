"""`vrt reproduce RUN`: a folder with the code, params and data of a training, and what differs from here."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vrt.lifecycle import EXIT_DONE

# What a project needs beside its own files to reach the same services; written by `vrt services up`.
SETTINGS = (".dvc/config.local", "prefect.toml")
LONGEST = 60


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `vrt reproduce`."""
    told = "check out code, params and data of a training, and say what differs from here"
    parser = subparsers.add_parser("reproduce", help=told, description=told)
    parser.add_argument("training", metavar="RUN", help="the id of its run in MLflow, or its lineage (NAME-FINGERPRINT)")
    parser.add_argument("--attempt", type=int, metavar="N", help="as that attempt had them (default: the last)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="a new folder (default: reproduced-LINEAGE)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Execute the command. Raises ValueError or RuntimeError, whose messages are for the user."""
    from vrt.checkpoint.errors import CheckpointError
    from vrt.observe import log
    from vrt.services import load_environment
    from vrt.services.state import find_home

    os.environ.update(load_environment())
    lineage, recorded = provenance_of(args.training, args.attempt)
    target = args.to or Path(f"reproduced-{lineage}")
    if target.exists():
        raise CheckpointError(f"{target}: expected a new folder, found an existing one; move it away, or name another with --to")
    lacking = check_out(recorded, target)
    lacking += bring_data(target)
    show(lineage, recorded)
    for line in lacking:
        log.warning("not as it was: %s", line)
    home = find_home(os.environ, Path.cwd())
    # Elsewhere than below the folder that has the services, they would not be found, and others be started.
    where = f"VRT_HOME={home} " if home.exists() and find_home(os.environ, target.resolve()) != home else ""
    log.info("go on in it: cd %s && %sdvc repro (it continues %s from its newest registered step, or finds everything done)", target, where, lineage)
    return EXIT_DONE


def provenance_of(training: str, attempt: int | None) -> tuple[str, dict[str, bytes]]:
    """The lineage, and what one of its attempts recorded. Raises CheckpointError where there is no such training or record."""
    from vrt.checkpoint.curator import Curator, lineage_named
    from vrt.checkpoint.errors import CheckpointError
    from vrt.checkpoint.store import S3Store
    from vrt.stages.provenance import folder_of
    from vrt.stages.start import unknown_lineage

    if re.fullmatch(r"[0-9a-f]{32}", training):
        training = Curator(lineage_named("any-0")).lineage_of_run(training)
    registry = Curator(lineage_named(training))
    if not registry.attach():
        raise CheckpointError(unknown_lineage(training, registry))
    number = attempt or registry.attempts()
    address = folder_of(registry.artifacts_address, number)
    recorded = S3Store(registry.checkpoints_address).beside(address)
    if "params.yaml" not in recorded:
        raise CheckpointError(f"{training}: attempt {number} recorded nothing at {address}; it has {registry.attempts()} attempts, try --attempt")
    return training, recorded


def check_out(recorded: Mapping[str, bytes], target: Path) -> list[str]:
    """Make `target` the project as it was; returns, in words, what could not be had."""
    from vrt.stages.provenance import CHANGES, CODE, FILES

    code, project, lacking = json.loads(recorded[CODE]), Path.cwd(), []
    if "commit" not in code:
        lacking.append(f"the code, of which only {code['version']!r} is recorded; this is the code here")
        _copy_project(project, target)
    elif not _clone(project, target, code["commit"]):
        lacking.append(
            f"commit {code['commit'][:12]} (branch {code['branch']}), which this repository does not have: fetch it; this is the code here"
        )
        _copy_project(project, target)
    elif CHANGES in recorded:
        applied = subprocess.run(["git", "apply", "--index", "-"], cwd=target, input=recorded[CHANGES], capture_output=True, check=False)
        if applied.returncode:
            lacking.append(f"the changes since the commit, which git can't apply: {applied.stderr.decode(errors='replace').strip()}")
    elif code["changed"]:
        lacking.append("the changes since the commit, which were too large to be recorded")
    lacking += [
        f"{name}, which git did not track and only its name is recorded" for name in code.get("untracked", []) if not (target / name).exists()
    ]
    for name in FILES:
        if name in recorded:
            (target / name).write_bytes(recorded[name])
    for name in SETTINGS:
        if (project / name).exists():
            shutil.copy2(project / name, target / name)
    return lacking


def _clone(project: Path, target: Path, commit: str) -> bool:
    """False: the repository does not have the commit."""

    def git(*arguments: str) -> bool:
        return subprocess.run(["git", *arguments], capture_output=True, check=False).returncode == 0

    if not git("-C", str(project), "cat-file", "-e", f"{commit}^{{commit}}"):
        return False
    return git("clone", "--quiet", "--no-checkout", str(project), str(target)) and git("-C", str(target), "checkout", "--quiet", "--detach", commit)


def _copy_project(project: Path, target: Path) -> None:
    for name in ("vrt", "pipelines", "recipes", ".dvc/config", ".dvcignore", ".gitignore", "data/raw"):
        source, copy = project / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, copy)


def bring_data(target: Path) -> list[str]:
    """Fetch what dvc.lock and the .dvc files of `target` name, from this project's cache or the remote."""
    cache = Path(".dvc/cache").resolve()
    has_git = (target / ".git").exists()
    settings = [["cache", "dir", "--local", str(cache)], *([] if has_git else [["config", "--local", "core.no_scm", "true"]])]
    for arguments in settings:
        _dvc(target, *arguments)
    # Some of it may never have been pushed: what is there is better than nothing, and `dvc repro` makes or misses the rest.
    ended = _dvc(target, "pull", "--allow-missing", "--force")
    if ended.returncode == 0:
        return []
    reason = ended.stdout.strip().splitlines()[-1] if ended.stdout.strip() else f"exit code {ended.returncode}"
    return [f"all of its data: `dvc pull` says: {reason}"]


def _dvc(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=target, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def show(lineage: str, recorded: Mapping[str, bytes]) -> None:
    """What differs between the training and here, as a table."""
    from rich.console import Console
    from rich.table import Table

    from vrt.stages.provenance import collect, differences

    found = differences(recorded, collect(Path("params.yaml")))
    if not found:
        Console().print(f"{lineage}: nothing differs from here", soft_wrap=True)
        return
    table = Table("what", "then", "here", title=f"{lineage}: what differs from here")
    for what, then, here in found:
        table.add_row(what, _short(then), _short(here))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
