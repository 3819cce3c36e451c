"""Training goes on whatever the store and the registry do, and in the end everything is registered with the right bytes.

Two real stores: rclone, which the local services use and which is lenient, and Swift, which is strict. What can't be had of a real server
(503, cut bodies, wrong bytes) a proxy in front of it does.
"""

import hashlib
import itertools
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.stages.fault_proxy import Fault, FaultProxy
from vrt.checkpoint.manifest import Manifest
from vrt.lifecycle import EXIT_DONE
from vrt.services import process

STEPS, EVERY = 6, 2
KEYS = {"rclone": ("test", "testing-testing"), "swift": ("test:tester", "testing")}
IN_ALL_BUT_HIDING = (Fault.BUSY, Fault.REFUSED, Fault.CUT_ANSWER, Fault.WRONG_ANSWER, Fault.CUT_UPLOAD, Fault.WRONG_UPLOAD)


class OwnStore:
    """A real S3 server of the test's own, which it may kill."""

    def __init__(self, kind: str, root: Path):
        self.kind = kind
        self._root = root
        # Between the session's services and the ports that the kernel hands out; Swift takes the next three too.
        self._port = process.free_port(31000 + os.getpid() * 8 % 1500, without=())
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        (self._root / "data").mkdir(parents=True, exist_ok=True)
        if self.kind == "swift":
            command = [sys.executable, str(Path(__file__).with_name("swift_server.py")), str(self._root / "data"), str(self._port)]
        else:
            rclone = shutil.which("rclone", path=sysconfig.get_path("scripts")) or "rclone"
            command = [rclone, "serve", "s3", "--addr", self.address.removeprefix("http://"), "--config", os.devnull, str(self._root / "data")]
        key, secret = KEYS[self.kind]
        with (self._root / "log").open("ab") as log:
            environment = os.environ | {"RCLONE_AUTH_KEY": f'"{key},{secret}"'}
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        client = self.client()
        for _ in range(300):
            try:
                return client.create_bucket(Bucket="mlflow")
            except (BotoCoreError, ClientError) as error:
                if "BucketAlready" in str(error):
                    return None
                assert self._process.poll() is None, (self._root / "log").read_text()
                time.sleep(0.1)
        raise AssertionError((self._root / "log").read_text())

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def client(self):
        key, secret = KEYS[self.kind]
        # Patience is not the subject here.
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
        keys = {"aws_access_key_id": key, "aws_secret_access_key": secret}
        return boto3.client("s3", endpoint_url=self.address, region_name="us-east-1", config=config, **keys)

    def variables(self, address: str) -> dict[str, str]:
        """What makes a trainer use it, at `address`."""
        key, secret = KEYS[self.kind]
        endpoint = {name: address for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL")}
        return endpoint | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}


@pytest.fixture(params=["rclone", "swift"])
def own_store(request, tmp_path: Path) -> Iterator[OwnStore]:
    if request.param == "swift":
        pytest.importorskip("swift", reason="Swift runs on Linux alone")
    store = OwnStore(request.param, tmp_path / "store")
    (tmp_path / "store").mkdir()
    try:
        store.start()
        yield store
    finally:
        store.kill()


@pytest.fixture
def workspace(make_workspace):
    made = make_workspace("faults")
    made.edit(train__checkpoint_every=EVERY, train__validate_every=EVERY, train__total_steps=STEPS, checkpoints__keep_last=STEPS)
    return made


@pytest.fixture
def assert_all_registered(versions_of) -> Callable[..., None]:
    """Each step is registered once, and its bytes in the store, read past our code and the proxy, are those of its manifest."""

    def check(workspace, client) -> None:
        versions = versions_of(workspace.name)
        assert sorted(int(version.tags["step"]) for version in versions) == [1, *range(EVERY, STEPS + 1, EVERY)]
        for version in versions:
            bucket, key = version.source.removeprefix("s3://").split("/", 1)

            def read(name: str, bucket=bucket, key=key) -> bytes:
                return client.get_object(Bucket=bucket, Key=f"{key}/{name}")["Body"].read()

            manifest = Manifest.from_bytes(read(f"{version.tags['step']}_manifest.json"), version.source)
            assert manifest.digest == version.tags["digest"]
            assert {file.name: hashlib.sha256(read(file.name)).hexdigest() for file in manifest.files} == {
                file.name: file.sha256 for file in manifest.files
            }

    return check


def now_and_then(share: float, faults: tuple[Fault, ...]) -> Callable[[str, str, bool], Fault | None]:
    """Spoils a share of the requests, in turn by each fault that can hit them. Seeded, but threads make the order vary."""
    rng, turns = random.Random(4), itertools.cycle(faults)

    def choose(method: str, path: str, has_body: bool) -> Fault | None:
        if rng.random() >= share:
            return None
        return next((fault for fault, _ in zip(turns, faults) if fault.can_hit(method, has_body)), None)

    return choose


def every_path_once(fault: Fault) -> Callable[[str, str, bool], Fault | None]:
    """Spoils the first request that it can hit of each object of a checkpoint."""
    seen: set[str] = set()

    def choose(method: str, path: str, has_body: bool) -> Fault | None:
        path = path.split("?")[0]
        if "/checkpoints/" not in path or path in seen or not fault.can_hit(method, has_body):
            return None
        seen.add(path)
        return fault

    return choose


def finished(attempt) -> str:
    """What it said by its end, which must be a good one."""
    assert attempt.wait() == 0, attempt.log.read_text()
    return attempt.log.read_text()


def test_with_a_store_that_spoils_a_tenth_of_all_requests_everything_is_registered(own_store, workspace, fork_server, assert_all_registered):
    with FaultProxy(own_store.address) as proxy:
        proxy.choose = now_and_then(0.1, IN_ALL_BUT_HIDING)
        finished(fork_server.train(workspace, variables=own_store.variables(proxy.address)))
        assert sum(proxy.told.values()) > 5, proxy.told
    assert_all_registered(workspace, own_store.client())


@pytest.mark.parametrize("seconds_more", [0, pytest.param(150, marks=pytest.mark.long)])
def test_while_the_tracking_server_is_gone_training_goes_on(workspace, fork_server, assert_all_registered, services, seconds_more):
    with FaultProxy(workspace.environment["MLFLOW_TRACKING_URI"]) as proxy:
        attempt = fork_server.train(workspace, variables={"MLFLOW_TRACKING_URI": proxy.address})
        workspace.wait_for("starting at step 1", attempt)
        proxy.choose = lambda *_: Fault.REFUSED
        workspace.wait_for(f"step {STEPS}: validation", attempt)
        workspace.wait_for("publishing is held up, training goes on: MLflow", attempt)
        time.sleep(seconds_more)
        assert "registered" not in workspace.log.read_text()
        proxy.choose = lambda *_: None
        finished(attempt)
    assert_all_registered(workspace, boto3.client("s3"))


@pytest.mark.long
@pytest.mark.parametrize("fault", [*IN_ALL_BUT_HIDING, Fault.SILENCE])
def test_a_fault_in_each_object_is_overcome(own_store, workspace, fork_server, assert_all_registered, fault):
    with FaultProxy(own_store.address) as proxy:
        proxy.choose = every_path_once(fault)
        if fault == Fault.SILENCE:
            # Each costs the patience of a minute.
            silent = itertools.islice(itertools.repeat(fault), 2)
            proxy.choose = lambda method, path, has_body: next(silent, None) if method == "PUT" else None
        finished(fork_server.train(workspace, variables=own_store.variables(proxy.address)))
        assert proxy.told[fault] > 1
    assert_all_registered(workspace, own_store.client())


@pytest.mark.long
def test_a_store_that_is_killed_in_mid_upload_is_waited_for(own_store, workspace, fork_server, assert_all_registered):
    uploads = itertools.count(1)

    def third_upload(method: str, path: str, has_body: bool) -> Fault | None:
        return Fault.CUT_UPLOAD if has_body and method == "PUT" and "/checkpoints/" in path and next(uploads) == 3 else None

    with FaultProxy(own_store.address) as proxy:
        proxy.choose = third_upload
        proxy.after_half_an_upload = own_store.kill
        attempt = fork_server.train(workspace, variables=own_store.variables(proxy.address))
        while not proxy.told[Fault.CUT_UPLOAD]:
            assert psutil.pid_exists(attempt.pid), workspace.log.read_text()
            time.sleep(0.1)
        time.sleep(10)
        own_store.start()
        finished(attempt)
    assert_all_registered(workspace, own_store.client())


@pytest.mark.long
def test_a_database_that_is_locked_for_a_minute_is_waited_for(workspace, fork_server, assert_all_registered, services, local_services):
    attempt = fork_server.train(workspace)
    workspace.wait_for("starting at step 1", attempt)
    with closing(sqlite3.connect(local_services.home / "services/mlflow/mlflow.db", timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        workspace.wait_for(f"step {STEPS}: validation", attempt)
        time.sleep(60)
        database.execute("ROLLBACK")
    finished(attempt)
    assert_all_registered(workspace, boto3.client("s3"))


@pytest.mark.long
def test_on_an_empty_machine_no_spoiled_request_makes_a_training_go_back(own_store, workspace, fork_server, assert_all_registered):
    workspace.edit(train__total_steps=EVERY)
    finished(fork_server.train(workspace, variables=own_store.variables(own_store.address)))
    shutil.rmtree(workspace.root / "checkpoints")
    workspace.edit(train__total_steps=STEPS)
    with FaultProxy(own_store.address) as proxy:
        proxy.choose = every_path_once(Fault.WRONG_ANSWER)
        for _ in range(12):
            attempt = fork_server.train(workspace, variables=own_store.variables(proxy.address))
            if attempt.wait() == EXIT_DONE:
                break
            # It may refuse to start, to be started again; never may it start from an older step, or from none.
            assert "does not answer" in attempt.log.read_text() and "starting at step 1" not in attempt.log.read_text()
    assert f"continuing after step {EVERY} of {STEPS}" in attempt.log.read_text()
    assert_all_registered(workspace, own_store.client())
