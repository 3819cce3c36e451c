"""What `up` writes into a project, so that plain `dvc` and `prefect` commands work there."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vrt.services import project, state
from vrt.services.endpoints import Endpoints
from vrt.services.state import State

STATE = State({"s3": 9000, "mlflow": 5000, "prefect": 4200}, "vrt-key", "hush")
REMOTE = "[core]\n    remote = storage\n    no_scm = true\n['remote \"storage\"']\n    url = s3://dvc/cache\n"


@pytest.fixture
def a_project(tmp_path: Path) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(REMOTE)
    return tmp_path


def settings_of(path: Path) -> dict[str, str]:
    return dict(line.strip().split(" = ", 1) for line in (path / ".dvc" / "config.local").read_text().splitlines() if " = " in line)


def without_aws(environ):
    return {key: value for key, value in environ.items() if not key.startswith(("AWS_", "MLFLOW_S3", "PREFECT_"))}


def test_plain_dvc_push_and_pull_work_without_variables(a_project, local_services):
    settings = state.load(local_services.home / "services")
    project.configure(a_project, settings, local_services.endpoints)
    environ = {**without_aws(os.environ), "DVC_NO_ANALYTICS": "1"}
    (a_project / "clip.bin").write_bytes(b"frames")

    def dvc(*arguments):
        ran = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=a_project, env=environ, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    dvc("add", "clip.bin")
    dvc("push")
    shutil.rmtree(a_project / ".dvc" / "cache")
    (a_project / "clip.bin").unlink()
    dvc("pull")
    assert (a_project / "clip.bin").read_bytes() == b"frames"


def test_dvc_is_told_where_there_is_no_git_and_again_once_there_is(a_project):
    (a_project / ".dvc" / "config").write_text(REMOTE.replace("    no_scm = true\n", ""))
    project.configure(a_project, STATE, STATE.endpoints)
    assert settings_of(a_project)["no_scm"] == "true"
    (a_project / ".git").mkdir()
    project.configure(a_project, STATE, STATE.endpoints)
    assert "no_scm" not in settings_of(a_project)


def test_the_key_in_dvcs_file_is_for_its_owner_only(a_project):
    project.configure(a_project, STATE, STATE.endpoints)
    assert stat.S_IMODE((a_project / ".dvc" / "config.local").stat().st_mode) == 0o600
    assert (a_project / ".dvc" / "config").read_text() == REMOTE


def test_other_local_settings_of_dvc_stay(a_project):
    (a_project / ".dvc" / "config.local").write_text("[cache]\n    dir = /data/cache\n")
    project.configure(a_project, STATE, STATE.endpoints)
    assert settings_of(a_project) == {
        "dir": "/data/cache",
        "endpointurl": "http://127.0.0.1:9000",
        "access_key_id": "vrt-key",
        "secret_access_key": "hush",
        "region": "us-east-1",
    }


def test_a_new_address_replaces_the_old_one(a_project):
    project.configure(a_project, STATE, STATE.endpoints)
    moved = State({**STATE.ports, "s3": 9007, "prefect": 4207}, "vrt-key", "hush")
    project.configure(a_project, moved, moved.endpoints)
    assert settings_of(a_project)["endpointurl"] == "http://127.0.0.1:9007"
    assert "4207" in (a_project / "prefect.toml").read_text()


def test_a_key_of_the_users_stays(a_project):
    theirs = "['remote \"storage\"']\n    access_key_id = AKIA\n    secret_access_key = theirs\n"
    (a_project / ".dvc" / "config.local").write_text(theirs)
    project.configure(a_project, STATE, STATE.endpoints)
    assert (a_project / ".dvc" / "config.local").read_text() == theirs


def test_a_store_of_the_users_takes_the_place_of_the_local_one(a_project):
    project.configure(a_project, STATE, STATE.endpoints)
    project.configure(a_project, STATE, Endpoints("https://s3.example", None, None))
    assert settings_of(a_project) == {}


@pytest.mark.parametrize("config", ["", "['remote \"storage\"']\n    url = /mnt/disk\n", "['remote \"other\"']\n    url = s3://x\n"])
def test_without_a_remote_in_s3_nothing_is_written_for_dvc(a_project, config):
    (a_project / ".git").mkdir()
    (a_project / ".dvc" / "config").write_text(config)
    project.configure(a_project, STATE, STATE.endpoints)
    assert not (a_project / ".dvc" / "config.local").exists()


def test_a_damaged_file_of_dvcs_is_named_and_does_not_stop_the_services(a_project, caplog):
    (a_project / ".dvc" / "config.local").write_text("[broken\n")
    project.configure(a_project, STATE, STATE.endpoints)
    assert "config.local: expected DVC's settings, found" in caplog.text


def test_outside_of_a_project_nothing_is_written():
    project.configure(None, STATE, STATE.endpoints)


def test_prefect_finds_the_server_without_variables(a_project):
    project.configure(a_project, STATE, STATE.endpoints)
    program = "from prefect.settings import get_current_settings; print(get_current_settings().api.url)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=a_project, env=without_aws(os.environ), capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "http://127.0.0.1:4200/api", ran.stderr


def test_a_prefect_file_of_the_users_stays(a_project, caplog):
    caplog.set_level("INFO", logger="vrt")
    (a_project / "prefect.toml").write_text("[api]\nurl = 'https://prefect.example/api'\n")
    project.configure(a_project, STATE, STATE.endpoints)
    assert "prefect.example" in (a_project / "prefect.toml").read_text()
    assert "is yours and stays as it is" in caplog.text


def test_a_given_prefect_is_not_written_down(a_project):
    project.configure(a_project, STATE, Endpoints("http://127.0.0.1:9000", None, "https://prefect.example/api", "vrt-key", "hush"))
    assert not (a_project / "prefect.toml").exists()
