"""Where a flow run trains: in the project's own folder, or, with other params than the project's, in a workspace beside it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configobj import ConfigObj
from ruamel.yaml import YAML

from pipelines.process import PROJECT
from vrt.params import Params, fingerprint
from vrt.status import STATUS
from vrt.typed_yaml import ParamsError, parse, read_yaml

RECIPES = PROJECT / "recipes"
PARAMS = "params.yaml"
RAW = Path("data/raw")
# What the stages of dvc.yaml need. Not dvc.lock: a workspace has its own.
SOURCES = ("vrt", "recipes", "dvc.yaml", ".dvcignore", ".dvc/config", ".dvc/config.local")


@dataclass(frozen=True)
class Project:
    """A folder to train in, and what its params file says (or, of a workspace not made yet, is to say)."""

    folder: Path
    params: Params

    @property
    def key(self) -> str:
        """Tells trainings apart before their data are prepared: of one key, only one may run."""
        resume = self.params.checkpoints.resume
        identity = self.params.identity() | ({"fork": resume} if resume.startswith("fork") else {})
        return f"{self.params.name}-{fingerprint(identity)[:10]}"

    @property
    def status(self) -> Path:
        """Where a training in it says how it stands."""
        return self.folder / STATUS


def plan(recipe: str | None, overrides: Mapping[str, Any]) -> Project:
    """Where to train with the project's params, or with a recipe and values (by dotted key) of one's own. Touches nothing.

    Raises ParamsError, which lists every wrong key.
    """
    source = RECIPES / f"{recipe}.yaml" if recipe else PROJECT / PARAMS
    tree = read_yaml(source)
    for key, value in overrides.items():
        _override(tree, key, value, source)
    own = Project(PROJECT, parse(Params, tree, source))
    if recipe is None and not overrides:
        return own
    # The same training with other steps or intervals goes on in the same workspace.
    return Project(PROJECT / ".vrt" / "workspaces" / own.key, own.params)


def _override(tree: Any, key: str, value: Any, source: Path) -> None:
    *path, last = key.split(".")
    section = tree
    for part in path:
        section = section.get(part) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise ParamsError(f"overrides: {key}: there is no section {'.'.join(path)!r} in {source.name}; a key looks like train.total_steps")
    section[last] = value


def make(project: Project) -> None:
    """Make the workspace of a project, or bring an older one up to date: code and stages as they are now, and the params.

    Only a run that has it for itself may call this. Its checkpoints and results stay. Raw data and DVC's cache are the project's own.
    """
    if project.folder == PROJECT:
        return
    project.folder.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source, copy = PROJECT / name, project.folder / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            # Machines that train together compare their code.
            for gone in [path for path in copy.rglob("*.py") if not (source / path.relative_to(copy)).exists()]:
                gone.unlink()
        elif source.exists():
            shutil.copy2(source, copy)
    raw = project.folder / RAW
    raw.parent.mkdir(exist_ok=True)
    if not raw.is_symlink():
        raw.symlink_to(PROJECT / RAW, target_is_directory=True)
    config = ConfigObj(str(project.folder / ".dvc" / "config.local"), encoding="utf-8")
    config.setdefault("cache", {})["dir"] = str(PROJECT / ".dvc" / "cache")
    # It lies in a folder that git ignores, where DVC under git would track nothing.
    config.setdefault("core", {})["no_scm"] = "true"
    config.write()
    unfinished = project.folder / f".unfinished-{PARAMS}"
    with open(unfinished, "w", encoding="utf-8") as file:
        YAML().dump(project.params.model_dump(mode="json"), file)
    unfinished.replace(project.folder / PARAMS)


PULL_RAW_DATA = ("pull", "--allow-missing", "--recursive", str(RAW))
"""What DVC is told, to fetch the data sets that people added. Not everything: that would put the outputs of dvc.lock in place of newer ones."""
