"""The folder of the local services and the one small file in it that is not data: ports and the key of the S3 server."""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vrt.observe import log
from vrt.services.endpoints import Endpoints

DEFAULT_PORTS = {"s3": 9000, "mlflow": 5000, "prefect": 4200}
# Tells keys that this project made from a user's own.
ACCESS_KEY_PREFIX = "vrt-"
_LOCK_PATIENCE_SECONDS = 300.0


class ServiceError(RuntimeError):
    """A local service can't be run as asked; the message says which, what was found and what to do."""


@dataclass(frozen=True)
class State:
    """What has to be the same after a restart."""

    ports: Mapping[str, int]
    access_key: str
    secret_key: str = field(repr=False)

    @property
    def endpoints(self) -> Endpoints:
        """The addresses and keys that clients on this machine need."""
        s3, mlflow, prefect = (f"http://127.0.0.1:{self.ports[name]}" for name in ("s3", "mlflow", "prefect"))
        return Endpoints(s3, mlflow, f"{prefect}/api", self.access_key, self.secret_key)


def new_state(ports: Mapping[str, int]) -> State:
    """Ports, and keys that nobody had before."""
    return State(dict(ports), ACCESS_KEY_PREFIX + secrets.token_hex(8), secrets.token_urlsafe(30))


def find_home(environ: Mapping[str, str], cwd: Path) -> Path:
    """`$VRT_HOME`, else the nearest `.vrt` upwards from `cwd`, else `.vrt` in the project around `cwd`."""
    if environ.get("VRT_HOME"):
        return Path(environ["VRT_HOME"]).expanduser().resolve()
    upwards = (cwd, *cwd.parents)
    existing = next((folder / ".vrt" for folder in upwards if (folder / ".vrt").is_dir()), None)
    return existing or (find_project(cwd) or cwd) / ".vrt"


def find_project(start: Path) -> Path | None:
    """The nearest folder from `start` upwards that holds a project."""
    return next((folder for folder in (start, *start.parents) if any((folder / mark).exists() for mark in ("params.yaml", ".git", ".dvc"))), None)


def load(folder: Path) -> State | None:
    """The state in `folder`, or None where no service was ever started. Raises ServiceError where its file is damaged."""
    path = folder / "services.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        read = json.loads(text)
        return State({name: int(read["ports"][name]) for name in DEFAULT_PORTS}, str(read["access_key"]), str(read["secret_key"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"{path}: expected ports, access_key and secret_key as JSON, found {type(error).__name__}: {error}; "
            "run `vrt services down`, move the file away and run `vrt services up`, which writes a new one (stored data stays)"
        ) from error


def save(folder: Path, state: State) -> None:
    """Write the state so that readers see the old or the new file, and only its owner sees any."""
    write_private(folder / "services.json", json.dumps(asdict(state), indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Replace `path` in one step by a file that only its owner can read."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def make_folder(folder: Path) -> None:
    """Create the services folder, closed to other users: it holds a key, and the data the key protects."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one `up` or `down` at a time; the lock goes with its process, however that ends.

    Raises ServiceError where another holds it for too long.
    """
    with open(folder / "lock", "w") as file:
        waiting_since = None
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting_since is None:
                    waiting_since = time.monotonic()
                    log.info("another `vrt services` command works on %s; waiting for it", folder)
                if time.monotonic() - waiting_since > _LOCK_PATIENCE_SECONDS:
                    raise ServiceError(
                        f"{folder / 'lock'}: expected another `vrt services` command to finish within {_LOCK_PATIENCE_SECONDS:.0f} s, "
                        "found it still at work; end that command, then run this one again"
                    ) from None
                time.sleep(0.1)
        yield
