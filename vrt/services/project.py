"""Lead plain `dvc` and `prefect` commands in a project to its services, through files that are not committed."""

import json
from pathlib import Path

from vrt.observe import log
from vrt.services.endpoints import REGION, Endpoints
from vrt.services.state import ACCESS_KEY_PREFIX, State, write_private

DVC_REMOTE = "storage"
_DVC_SETTINGS = ("endpointurl", "access_key_id", "secret_access_key", "region")
_OURS = "# Written by `vrt services up`, which keeps it current; belongs to this machine, not into git."


def configure(project: Path | None, settings: State, chosen: Endpoints) -> None:
    """Write the addresses and keys into the project around us, if there is one; files and keys of the user's stay as they are."""
    if project is None:
        return
    _configure_dvc(project, chosen)
    _configure_scm(project)
    if chosen.prefect == settings.endpoints.prefect:
        _configure_prefect(project, settings.endpoints.prefect)


def _configure_dvc(project: Path, chosen: Endpoints) -> None:
    """Give DVC's remote its endpoint and key. Not by `dvc remote modify`: that is four processes of 0.5 s, and not atomic."""
    from configobj import ConfigObj, ConfigObjError

    committed, local = project / ".dvc" / "config", project / ".dvc" / "config.local"
    if not committed.is_file():
        return
    section = f'remote "{DVC_REMOTE}"'
    try:
        url = ConfigObj(_lines(committed)).get(section, {}).get("url", "")
        config = ConfigObj(_lines(local))
    except ConfigObjError as error:
        log.warning("%s or config.local: expected DVC's settings, found %s; repair it, then run `vrt services up` again", committed, error)
        return
    if not url.startswith("s3://"):
        log.info("%s names no remote %s at s3://: nothing to tell DVC", committed, DVC_REMOTE)
        return
    remote = config.setdefault(section, {})
    before = dict(remote)
    ours = remote.get("access_key_id", "").startswith(ACCESS_KEY_PREFIX)
    if not ours and any(name in remote for name in _DVC_SETTINGS):
        log.info("%s has settings of yours for remote %s: left as they are", local, DVC_REMOTE)
        return
    if chosen.access_key and chosen.secret_key:
        values = (chosen.s3, chosen.access_key, chosen.secret_key, REGION)
        remote.update(dict(zip(_DVC_SETTINGS, values, strict=True)))
    elif ours:
        # An S3 server of the environment: DVC takes it and its credentials from there, but only where the file names no others.
        for name in _DVC_SETTINGS:
            remote.pop(name, None)
    if remote != before:
        write_private(local, "\n".join(config.write()) + "\n")
        log.info("DVC knows the S3 server of its remote %s (%s)", DVC_REMOTE, local)


def _configure_scm(project: Path) -> None:
    """Let DVC work where there is no git, without which it otherwise refuses to do anything."""
    from configobj import ConfigObj, ConfigObjError

    committed, local = project / ".dvc" / "config", project / ".dvc" / "config.local"
    if not committed.is_file():
        return
    try:
        config, shared = ConfigObj(_lines(local)), ConfigObj(_lines(committed))
    except ConfigObjError:
        # Said already.
        return
    under_git = any((folder / ".git").exists() for folder in (project, *project.parents))
    told = "no_scm" in config.get("core", {})
    if under_git != told or "no_scm" in shared.get("core", {}):
        return
    if under_git:
        config["core"].pop("no_scm")
    else:
        config.setdefault("core", {})["no_scm"] = "true"
        log.info("there is no git here: DVC works without it (its experiments and comparisons with earlier versions need git)")
    write_private(local, "\n".join(config.write()) + "\n")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _configure_prefect(project: Path, address: str) -> None:
    """Prefect reads `prefect.toml` in the current folder; `.env` it reads too, but so do other tools."""
    path = project / "prefect.toml"
    text = f"{_OURS}\n[api]\nurl = {json.dumps(address)}\n"
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    if found == text:
        return
    if found and not found.startswith(_OURS):
        log.info("%s is yours and stays as it is; Prefect's API is at %s", path, address)
        return
    write_private(path, text)
