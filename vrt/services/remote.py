"""Where DVC's default remote is, and what leads there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import boto3


@contextmanager
def dvc_remote(project: Path) -> Iterator["tuple[str, boto3.Session] | None"]:
    """(s3://bucket/key, a session with its key) of the default remote, whose endpoint is the environment's meanwhile; None: there is none at s3://.

    Raises ValueError where DVC's settings can't be read.
    """
    import boto3

    settings = _settings(project)
    remote = settings.get(f'remote "{settings.get("core", {}).get("remote", "")}"', {})
    if not remote.get("url", "").startswith("s3://"):
        yield None
        return
    names = {"AWS_ENDPOINT_URL_S3": "endpointurl", "AWS_ACCESS_KEY_ID": "access_key_id", "AWS_SECRET_ACCESS_KEY": "secret_access_key"}
    given = {variable: remote[name] for variable, name in names.items() if remote.get(name)}
    before = {variable: os.environ.get(variable) for variable in given}
    os.environ.update(given)
    try:
        # Not boto3's own session, which remembers the key it was first used with.
        yield remote["url"].rstrip("/"), boto3.Session(region_name=remote.get("region"))
    finally:
        for variable, value in before.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value


def _settings(project: Path) -> dict:
    from configobj import ConfigObj, ConfigObjError

    settings = ConfigObj()
    try:
        for name in ("config", "config.local"):
            path = project / ".dvc" / name
            if path.is_file():
                settings.merge(ConfigObj(path.read_text(encoding="utf-8").splitlines()))
    except ConfigObjError as error:
        raise ValueError(f"{project / '.dvc'}: expected DVC's settings, found {error}; repair them") from None
    return settings
