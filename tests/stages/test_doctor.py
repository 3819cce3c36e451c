"""`vrt doctor` finds what would stop a training, and says how to mend it."""

import http.server
import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import boto3
import pytest

from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE, EXIT_UNAVAILABLE
from vrt.params import load_params
from vrt.stages import doctor
from vrt.stages.doctor import Finding, checkpoint_bytes, verdict
from vrt.training.session import build_network


@pytest.fixture(scope="module")
def workspace(make_workspace):
    return make_workspace("doctor")


@pytest.fixture
def here(workspace, services, monkeypatch):
    """This process stands in a workspace with everything a training needs."""
    monkeypatch.chdir(workspace.root)
    return workspace


def found(check) -> Finding:
    return check(load_params(Path("params.yaml")))


def objects(services, bucket: str) -> list[str]:
    client = boto3.client("s3", endpoint_url=services["MLFLOW_S3_ENDPOINT_URL"])
    return [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", []) if "doctor" in item["Key"]]


def test_where_everything_works_it_says_so_and_leaves_nothing(here, services):
    ended = here.vrt("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(ended.stdout)}
    assert ended.returncode == EXIT_DONE, ended.stdout
    assert list(findings) == ["processor", "disk", "data", "MLflow", "S3", "DVC remote", "clock", "Prefect", "git"]
    assert {subject for subject, finding in findings.items() if finding["state"] != "ok"} == {"git"}, findings
    assert "an object was written, listed, read and deleted" in findings["S3"]["found"]
    assert findings["git"]["remedy"] == "runs will not name their code: `git init`, `git commit`"
    assert objects(services, "mlflow") == objects(services, "dvc") == []
    shown = here.vrt("doctor")
    assert shown.returncode == EXIT_DONE and "a training can start" in shown.stdout


def test_services_that_are_gone_are_named_with_what_to_run(here):
    ended = here.vrt("doctor", variables={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert ended.returncode == EXIT_UNAVAILABLE
    assert "a training can't start yet: MLflow, S3" in ended.stdout and "`vrt services up`" in ended.stdout


def test_a_wrong_key_is_told_from_a_store_that_is_gone(here, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    refused = found(doctor.s3)
    assert refused.state == "wrong" and refused.remedy == "the key needs the rights to put, get, list and delete objects", refused
    assert found(doctor.remote).state == "ok", "DVC has its own key"
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    gone = found(doctor.s3)
    assert gone.state == "unavailable" and "does not answer" in gone.found


def test_the_remote_of_dvc_is_tried_with_its_own_key(here, tmp_path, monkeypatch):
    shutil.copytree(here.root / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(here.root / "params.yaml", tmp_path)
    local = tmp_path / ".dvc/config.local"
    local.write_text(local.read_text().replace("secret_access_key = ", "secret_access_key = x"))
    assert found(doctor.remote).state == "wrong"
    local.write_text("[core\n")
    assert found(doctor.remote).state == "wrong" and "expected DVC's settings" in found(doctor.remote).found
    shutil.rmtree(tmp_path / ".dvc")
    assert found(doctor.remote) == Finding(
        "DVC remote", "warning", "none at s3://", "`dvc remote add --default NAME s3://BUCKET`, or data and models stay on this machine"
    )


def test_data_that_a_training_refuses_are_told_before(here):
    here.edit(train__crop=64)
    try:
        refused = found(doctor.data)
        assert refused.state == "wrong" and "expected frames of at least train.crop = 64 pixels" in refused.found
    finally:
        here.edit(train__crop=16)
    assert found(doctor.data).found.startswith("tiny: 4 clips, digest ")
    here.edit(data__dataset="nowhere")
    prepared = (here.root / "data/prepared").rename(here.root / "data/elsewhere")
    try:
        assert found(doctor.data) == Finding("data", "wrong", "no data set data/raw/nowhere", "`vrt data import`, `dvc pull`, or set data.dataset")
    finally:
        prepared.rename(here.root / "data/prepared")
        here.edit(data__dataset="tiny")


def test_a_disk_too_small_for_the_checkpoints_is_told(here, monkeypatch):
    params = load_params(Path("params.yaml"))
    network = build_network(params.network)
    size = sum(value.nbytes for value in network.state_dict().values())
    assert checkpoint_bytes(params) == 2 * size + 2 * sum(value.nbytes for value in network.parameters())
    needed = checkpoint_bytes(params) * 6
    for free, state in ((needed, "ok"), (needed - 1, "wrong")):
        usage = namedtuple("usage", "total used free")(10**12, 0, free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert found(doctor.disk).state == state


class WrongClock(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.send_response_only(200)
        self.send_header("Date", "Mon, 24 Nov 2025 12:00:00 GMT")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_clock_that_is_off_is_told(here, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), WrongClock) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        off = found(doctor.clock)
        server.shutdown()
    assert off.state == "wrong" and "s off that of http://127.0.0.1" in off.found and "NTP" in off.remedy


@pytest.mark.parametrize(
    "states, code",
    [
        (("ok", "warning"), EXIT_DONE),
        (("ok", "unavailable"), EXIT_UNAVAILABLE),
        (("unavailable", "wrong"), EXIT_BAD_INPUT),
    ],
)
def test_the_exit_code_says_whether_waiting_can_help(states, code):
    assert verdict([Finding("x", state, "") for state in states]) == code
