"""`vrt doctor` finds what would stop a training, and says how to mend it."""

import ast
import http.server
import json
import re
import shutil
import socket
import threading
from pathlib import Path

import boto3
import pytest
import torch

from tests.wrong_clock import set_clock
from vrt.checkpoint.errors import StoreRefuses
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE, EXIT_UNAVAILABLE, MACHINES, PROCESSES
from vrt.params import load_params
from vrt.services import local
from vrt.stages import doctor
from vrt.stages.doctor import verdict
from vrt.stages.finding import Finding


@pytest.fixture(scope="module")
def workspace(make_workspace):
    return make_workspace("doctor")


@pytest.fixture
def here(workspace, services, monkeypatch):
    """This process stands in a workspace with everything a training needs."""
    monkeypatch.chdir(workspace.root)
    return workspace


def found(check):
    return check(load_params(Path("params.yaml")))


def of_s3() -> Finding:
    return doctor.s3("s3://mlflow")


def objects(services, bucket: str) -> list[str]:
    client = boto3.client("s3", endpoint_url=services["MLFLOW_S3_ENDPOINT_URL"])
    return [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", []) if "doctor" in item["Key"]]


def test_where_everything_works_it_says_so_and_leaves_nothing(here, services):
    ended = here.vrt("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(ended.stdout)}
    assert ended.returncode == EXIT_DONE, ended.stdout
    assert list(findings) == ["processor", "processes", "memory", "disk", "data", "MLflow", "S3", "DVC remote", "clock", "Prefect", "git"]
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


def test_a_service_that_takes_questions_and_answers_none_holds_nobody_up(here, services, monkeypatch):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for variable in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
            monkeypatch.setenv(variable, address)
        assert doctor.in_time("DVC remote", doctor.remote).state == "ok", "which is another server"
        monkeypatch.setattr(doctor, "SECONDS_FOR_A_STORE", 1)
        finding = doctor.in_time("S3", of_s3)
        assert (finding.state, finding.found) == ("unavailable", "no answer within 1 s")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        findings = {finding.subject: finding for finding in doctor.examine(load_params(Path("params.yaml")), 1, before_preparing=False)}
        assert findings["MLflow"].found == "no answer within 1 s" and findings["S3"].remedy == "mend MLflow first"


def test_processes_that_a_training_refuses_are_told_before(here, monkeypatch):
    def judged(machines: int = 1, **values: object) -> Finding:
        here.edit(**{f"train__{key}": value for key, value in values.items()})
        return doctor.processes(load_params(Path("params.yaml")), machines)[0]

    try:
        assert judged(batch_size=4, processes=2) == Finding("processes", "ok", "2; clips a step, of all together: 4")
        assert judged(machines=2) == Finding("processes", "ok", "2 on each of 2 machines; clips a step, of all together: 4")
        shared = Finding(
            "processes",
            "wrong",
            "train.batch_size 4: expected a multiple of the 6 processes that share it",
            "choose a number of processes that divides it",
        )
        assert judged(machines=3) == shared
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        refused = judged()
        assert refused.state == "wrong" and refused.found == "train.processes 2: expected at most one for each of the 1 GPUs here"
        assert refused.remedy == "lower it, or set it to auto"
        # As the launcher, such as the flow, says it.
        wrong = wrong_of(here.vrt("doctor", "--json", variables={PROCESSES: "2", MACHINES: "3"}))
        assert [finding["found"] for finding in wrong] == [shared.found]
    finally:
        here.edit(train__batch_size=1, train__processes=1)


def test_a_compiled_training_without_a_compiler_is_told_before(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(headers))

    def judged(gpu: bool) -> tuple[str, str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        finding = doctor.compiler()
        assert finding.state == "ok" or finding.remedy == (
            "`apt-get install gcc g++ python3-dev`, in a container in an image of your own, or set train.compile: false"
        )
        return finding.state, finding.found

    missing = "train.compile: true, but there is no"
    assert judged(gpu=True) == ("wrong", f"{missing} C compiler (gcc or clang, or what $CC names) and no {headers}/Python.h")
    (headers / "Python.h").touch()
    assert judged(gpu=False) == ("wrong", f"{missing} C++ compiler (g++, or what $CXX names)")
    for name in ("clang", "g++", "mine"):
        (tmp_path / name).touch(0o755)
    assert judged(gpu=True) == ("ok", f"{tmp_path}/clang, and Python's headers")
    assert judged(gpu=False) == ("ok", f"{tmp_path}/g++, and Python's headers")
    monkeypatch.setenv("CXX", "mine")
    assert judged(gpu=False) == ("ok", f"{tmp_path}/mine, and Python's headers")
    monkeypatch.setenv("CC", "none")
    assert judged(gpu=True) == ("wrong", f"{missing} C compiler ($CC names none)")


def test_only_a_compiled_training_is_asked_for_a_compiler(here):
    try:
        here.edit(train__compile=True)
        ended = here.vrt("doctor", "--json")
    finally:
        here.edit(train__compile=False)
    assert [finding["subject"] for finding in json.loads(ended.stdout)][:2] == ["processor", "compiler"]


def test_a_password_in_an_address_is_not_shown(here, services, monkeypatch):
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, services[name].replace("://", "://somebody:secret@"))
    findings = [doctor.prefect(), found(doctor.mlflow)[0], *(service for service in local.status() if service.name in ("prefect", "mlflow"))]
    assert [finding.state for finding in findings] == ["ok", "ok", "up", "up"]
    assert "secret" not in str(findings)
    monkeypatch.setenv("PREFECT_API_URL", "http://somebody:se#cret@127.0.0.1:4200/api")
    assert doctor.prefect().state == "warning" and doctor.prefect().found == "PREFECT_API_URL is no address"


def test_a_wrong_key_is_told_from_a_store_that_is_gone(here, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    refused = of_s3()
    assert refused.state == "wrong" and refused.remedy == "the key needs the rights to put, get, list and delete objects", refused
    assert doctor.remote().state == "ok", "DVC has its own key"
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    gone = of_s3()
    assert gone.state == "unavailable" and "does not answer" in gone.found


def test_the_remote_of_dvc_is_tried_with_its_own_key(here, tmp_path, monkeypatch):
    shutil.copytree(here.root / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(here.root / "params.yaml", tmp_path)
    local = tmp_path / ".dvc/config.local"
    local.write_text(local.read_text().replace("secret_access_key = ", "secret_access_key = x"))
    assert doctor.remote().state == "wrong"
    local.write_text("[core\n")
    assert doctor.remote().state == "wrong" and "expected DVC's settings" in doctor.remote().found
    shutil.rmtree(tmp_path / ".dvc")
    assert doctor.remote() == Finding(
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


def test_raw_data_that_a_pull_fetches_are_no_reason_to_give_up(here):
    raw = here.root / "data/raw"
    here.edit(data__dataset="added")
    try:
        assert found(doctor.data).found == "no data set data/raw/added", "clips of another data set are prepared"
        (raw / "added.dvc").write_text("outs:\n- path: added\n")
        fetched = Finding("data", "warning", "data/raw/added is not here yet", "`dvc pull data/raw/added.dvc`, which the flow `train` does by itself")
        assert found(doctor.data) == found(doctor.raw_data) == fetched
        shutil.copytree(raw / "tiny", raw / "added")
        assert found(doctor.data) == Finding("data", "ok", "data/raw/added is here; `dvc repro` prepares it")
    finally:
        shutil.rmtree(raw / "added", ignore_errors=True)
        (raw / "added.dvc").unlink(missing_ok=True)
        here.edit(data__dataset="tiny")


def test_before_preparing_clips_that_were_prepared_earlier_do_not_count(here):
    index = here.root / "data/prepared/index.json"
    sound = index.read_text()
    index.write_text("of another version")
    try:
        assert "data" in {finding["subject"] for finding in wrong_of(here.vrt("doctor", "--json"))}
        assert wrong_of(here.vrt("doctor", "--json", "--before-preparing")) == []
    finally:
        index.write_text(sound)


def wrong_of(ended) -> list[dict[str, str]]:
    return [finding for finding in json.loads(ended.stdout) if finding["state"] == "wrong"]


def test_a_clock_that_the_store_refuses_is_told_from_missing_rights(here, monkeypatch):
    of_mlflow, home = found(doctor.mlflow)
    assert of_mlflow.state == "ok"
    right = doctor.clock(home)
    # Of a busy machine an answer takes its time.
    assert right.state == "ok" and re.fullmatch(r"within [0-9]+ s of S3 and MLflow's server", right.found)
    set_clock(monkeypatch, -3600)
    refused, off = doctor.s3(home), doctor.clock(home)
    assert refused.state == off.state == "wrong" and refused.remedy == off.remedy == doctor.SYNCHRONISE
    assert "the store refused this machine's clock" in refused.found
    assert re.fullmatch(r"-3(59[0-9]|600) s off that of S3", off.found)
    assert "synchronise" in doctor.SYNCHRONISE and "NTP" in doctor.SYNCHRONISE


class WrongClock(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        self.send_response_only(200)
        self.send_header("Date", "Mon, 24 Nov 2025 12:00:00 GMT")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_an_mlflow_that_lets_nobody_in_needs_a_person(here, monkeypatch):
    def refuse(curator):
        raise StoreRefuses(f"MLflow at http://mlflow refused (403); {doctor.CHECK_MLFLOW}")

    monkeypatch.setattr(doctor.Curator, "home", refuse)
    finding, home = doctor.mlflow(load_params(Path("params.yaml")))
    assert (finding.state, finding.found, finding.remedy) == ("wrong", "MLflow at http://mlflow refused (403)", doctor.CHECK_MLFLOW)
    assert home is None


def test_where_the_store_does_not_tell_the_time_the_server_of_mlflow_does(here, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), WrongClock) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        off = doctor.clock(None)
        server.shutdown()
    assert off.state == "wrong" and off.found.endswith("s off that of MLflow's server") and off.remedy == doctor.SYNCHRONISE
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert doctor.clock(None).state == "warning" and doctor.clock(None).found == "no server tells the time"


def test_whatever_is_not_ok_comes_with_how_to_mend_it():
    """Of all findings that the code can make, not only of those that tests provoke."""
    stages = Path(doctor.__file__).parent
    made = [
        (f"{path.name}:{node.lineno}", node.args)
        for path in stages.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding"
    ]
    states = {ast.unparse(arguments[1]) for _, arguments in made}
    assert states == {"'ok'", "'warning'", "'wrong'", "'unavailable'"}
    assert [place for place, arguments in made if ast.unparse(arguments[1]) != "'ok'" and len(arguments) < 4] == []


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
