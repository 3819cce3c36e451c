"""S3, MLflow and Prefect together: what they keep, what they show, whom they refuse, and that nothing stays behind."""

import json
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from vrt import services
from vrt.services import Endpoints, process, servers, state
from vrt.services.servers import TITLES
from vrt.services.state import ServiceError


def ask(address: str, body: dict | None = None, **headers: str):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or "null")


def s3_client(of: Endpoints, secret: str | None = None):
    keys = {"aws_access_key_id": of.access_key, "aws_secret_access_key": secret or of.secret_key}
    return boto3.client("s3", endpoint_url=of.s3, region_name="us-east-1", config=Config(s3={"addressing_style": "path"}), **keys)


def all_processes(home: Path) -> list[psutil.Process]:
    """Every process of the home by its mark, and, apart from that, by the home's path on its command line."""
    marked = [one for name in TITLES for one in process.members(servers.mark(name, home / "services"))]
    named = [one for one in psutil.process_iter(["cmdline", "status"]) if str(home) in " ".join(one.info["cmdline"] or ())]
    return list({one.pid: one for one in (*marked, *named)}.values())


def kill_9(processes: list[psutil.Process]) -> None:
    for one in processes:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def test_no_page_of_another_site_starts_runs_in_prefect_through_a_browser(local_services):
    address = local_services.endpoints.prefect
    own = address.removesuffix("/api")
    by_name = own.replace("127.0.0.1", "localhost")
    for origin, allowed in ((own, own), (by_name, by_name), ("https://elsewhere.example", None)):
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        request = urllib.request.Request(f"{address}/deployments/filter", headers=asks, method="OPTIONS")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                told = answer.headers.get("Access-Control-Allow-Origin")
        except urllib.error.HTTPError as refused:
            told = refused.headers.get("Access-Control-Allow-Origin")
        assert told == allowed, origin


@pytest.mark.long
def test_what_was_stored_survives_kill_9_of_everything(full_home):
    first = services.up(full_home)
    assert [service.state for service in first] == ["up"] * 3
    at = state.load(full_home / "services").endpoints
    s3_client(at).put_object(Bucket="dvc", Key="clips/tree.npy", Body=b"frames")
    run = ask(f"{at.mlflow}/api/2.0/mlflow/runs/create", {"experiment_id": "0", "run_name": "before"})["run"]["info"]
    ask(f"{at.mlflow}/api/2.0/mlflow/runs/log-metric", {"run_id": run["run_id"], "key": "psnr", "value": 31.5, "timestamp": 1, "step": 40})
    variable = ask(f"{at.prefect}/variables/", {"name": "lineage", "value": "vrt-1"})

    kill_9(all_processes(full_home))
    assert [service.state for service in services.status(full_home)] == ["down"] * 3
    second = services.up(full_home)

    assert [service.address for service in second] == [service.address for service in first]
    assert not {service.pid for service in first} & {service.pid for service in second}
    assert s3_client(at).get_object(Bucket="dvc", Key="clips/tree.npy")["Body"].read() == b"frames"
    kept = ask(f"{at.mlflow}/api/2.0/mlflow/runs/get?run_id={run['run_id']}")["run"]
    assert kept["data"]["metrics"][0]["value"] == 31.5
    assert kept["info"]["artifact_uri"].startswith("s3://mlflow/")
    assert ask(f"{at.prefect}/variables/name/lineage")["id"] == variable["id"]


@pytest.mark.long
def test_mlflow_follows_an_s3_server_that_had_to_move(full_home):
    before = {service.name: service for service in services.up(full_home)}
    kill_9(process.members(servers.mark("s3", full_home / "services")))
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", state.load(full_home / "services").ports["s3"]))
        stranger.listen()
        after = {service.name: service for service in services.up(full_home)}
    assert after["s3"].address != before["s3"].address
    assert psutil.Process(after["mlflow"].pid).environ()["MLFLOW_S3_ENDPOINT_URL"] == after["s3"].address
    assert after["mlflow"].address == before["mlflow"].address
    assert after["prefect"] == before["prefect"], "it has nothing to do with S3 and was left alone"


@pytest.mark.long
def test_down_leaves_nothing_even_where_only_the_parents_were_killed(full_home):
    states = services.up(full_home)
    kill_9([psutil.Process(service.pid) for service in states])
    orphans = process.members(servers.mark("mlflow", full_home / "services"))
    assert orphans, "MLflow's parent leaves the process that serves; without it this test shows nothing"
    assert services.down(full_home) == ["mlflow"]
    assert all_processes(full_home) == []
    assert process.is_free(state.load(full_home / "services").ports["mlflow"])


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path, make_home, local_services, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", local_services.endpoints.prefect)
    home = make_home(tmp_path / ".vrt")
    database = home / "services" / "mlflow" / "mlflow.db"
    database.parent.mkdir()
    database.write_bytes(b"not a database " * 100)
    try:
        with pytest.raises(ServiceError) as error:
            services.up(home)
        message = str(error.value)
        address = f"http://127.0.0.1:{state.load(home / 'services').ports['mlflow']}/health"
        assert message.startswith(f"MLflow: expected an answer at {address}, found its process ended with exit code ")
        assert f"The last lines of {home / 'services' / 'logs' / 'mlflow.log'}:\n    " in message
        assert "file is not a database" in message
        assert message.endswith("Repair what they name, then run `vrt services up` again; the services that are up stay up.")
        assert [service.state for service in services.status(home)] == ["up", "down", "up"]
    finally:
        services.down(home)


def test_what_a_run_logs_goes_to_s3_and_the_server_shows_it(local_services):
    program = """
import mlflow
with mlflow.start_run() as run:
    mlflow.log_text("a preview", "previews/tree.txt")
print(run.info.run_id, run.info.artifact_uri)
"""
    ran = subprocess.run([sys.executable, "-c", program], env=dict(local_services.environment), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    run_id, uri = ran.stdout.split()[-2:]
    at = local_services.endpoints
    assert uri.startswith("s3://mlflow/")
    key = f"{uri.removeprefix('s3://mlflow/')}/previews/tree.txt"
    assert s3_client(at).get_object(Bucket="mlflow", Key=key)["Body"].read() == b"a preview"
    # The two addresses that the pages in the browser ask.
    listed = ask(f"{at.mlflow}/ajax-api/2.0/mlflow/artifacts/list?run_id={run_id}&path=previews")
    assert [file["path"] for file in listed["files"]] == ["previews/tree.txt"]
    with urllib.request.urlopen(f"{at.mlflow}/get-artifact?path=previews/tree.txt&run_uuid={run_id}", timeout=30) as answer:
        assert answer.read() == b"a preview"


def test_mlflow_refuses_a_page_that_pretends_to_be_this_machine(local_services):
    search = f"{local_services.endpoints.mlflow}/ajax-api/2.0/mlflow/experiments/search"
    assert ask(search, {"max_results": 1})["experiments"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(search, {"max_results": 1}, Host="evil.example")


def test_s3_refuses_a_wrong_secret_and_no_key(local_services):
    at = local_services.endpoints
    with pytest.raises(ClientError, match="SignatureDoesNotMatch|AccessDenied"):
        s3_client(at, secret="wrong").list_objects_v2(Bucket="dvc")
    with pytest.raises(urllib.error.HTTPError, match="40[03]"):
        urllib.request.urlopen(f"{at.s3}/dvc", timeout=30)
    assert {bucket["Name"] for bucket in s3_client(at).list_buckets()["Buckets"]} == {"dvc", "mlflow"}


def test_servers_listen_on_loopback_only(local_services):
    for name in TITLES:
        members = process.members(servers.mark(name, local_services.home / "services"))
        listening = [one for member in members for one in member.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}, name


def test_the_secret_is_in_no_command_line_and_no_log(local_services):
    secret = local_services.endpoints.secret_key
    processes = all_processes(local_services.home)
    assert len(processes) >= 4
    assert not [one.pid for one in processes if secret in " ".join(one.cmdline())]
    logs = list((local_services.home / "services" / "logs").iterdir())
    assert {log.name for log in logs} >= {"s3.log", "mlflow.log", "prefect.log"}
    assert not [log for log in logs if secret in log.read_text(errors="replace")]
    holders = [path for path in local_services.home.rglob("*.json") if secret in path.read_text(errors="replace")]
    assert [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in holders] == [("services.json", 0o600)]
