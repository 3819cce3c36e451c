"""`up`, `status` and `down` of the local services, and the environment that leads every other command to them."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Literal

from vrt.observe import log, without_credentials
from vrt.services import endpoints, process, project, servers, state
from vrt.services.endpoints import Endpoints
from vrt.services.servers import TITLES, Server
from vrt.services.state import ServiceError, State

_START_SECONDS = 120.0
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_LOOKS = 0.2
_LOG_TAIL_LINES = 15
_NOWHERE = Endpoints(None, None, None)


@dataclass(frozen=True)
class ServiceState:
    """What a person wants to know of one service."""

    name: str
    address: str | None
    state: Literal["up", "not answering", "down"]
    given: bool
    """The environment names this one; nothing local runs for it."""
    pid: int | None = None
    data: Path | None = None
    log: Path | None = None


def up(home: Path | None = None) -> list[ServiceState]:
    """Start what is not running and not given by the environment; return once everything answers."""
    environ = dict(os.environ)
    folder = _folder(home)
    state.make_folder(folder)
    with state.locked(folder):
        settings = state.load(folder) or state.new_state(state.DEFAULT_PORTS)
        given = endpoints.given(environ, settings.endpoints)
        for name, address in given.items():
            log.info("%s is given by the environment: %s", TITLES[name], without_credentials(address))
        names = [name for name in TITLES if name not in given]
        # Addresses of ours that a shell had from `vrt services env` are not the user's choice, and they may be about to move.
        stale = {variable for name in names for variable in endpoints.GIVEN_BY[name]}
        environ = {variable: value for variable, value in environ.items() if variable not in stale}
        everything_answers = False
        while not everything_answers:
            settings = _settle_ports(folder, settings, names)
            chosen = endpoints.choose(environ, settings.endpoints)
            described = servers.describe(folder, settings, chosen, environ)
            ours = [described[name] for name in names]
            _make_room(ours, given.get("s3"), environ)
            everything_answers = _start(ours)
        project.configure(_project(home), settings, chosen)
    return _status(folder, environ)


def status(home: Path | None = None) -> list[ServiceState]:
    """Look at each service, change nothing."""
    return _status(_folder(home), os.environ)


def _status(folder: Path, environ: Mapping[str, str]) -> list[ServiceState]:
    settings = state.load(folder)
    local = settings.endpoints if settings else _NOWHERE
    given = endpoints.given(environ, local)
    ours = servers.describe(folder, settings, endpoints.choose(environ, local), environ) if settings else {}
    return [_look(name, given.get(name), ours.get(name)) for name in TITLES]


def down(home: Path | None = None) -> list[str]:
    """End every local service, whoever started it and whatever became of its parent; return the names of those that ran."""
    folder = _folder(home)
    if not folder.is_dir():
        return []
    with state.locked(folder):
        running = [name for name in TITLES if process.members(servers.mark(name, folder))]
        process.stop([servers.mark(name, folder) for name in running])
    return running


def load_environment(home: Path | None = None) -> dict[str, str]:
    """The variables to add to the environment so that every tool finds its service; starts nothing, contacts nobody."""
    settings = state.load(_folder(home))
    chosen = endpoints.choose(os.environ, settings.endpoints if settings else _NOWHERE)
    return endpoints.environment(chosen, os.environ)


def _folder(home: Path | None) -> Path:
    return (home or state.find_home(os.environ, Path.cwd())).resolve() / "services"


def _project(home: Path | None) -> Path | None:
    """The project to configure: the one around a home that was named, else the one the user stands in."""
    return state.find_project(home.resolve().parent if home else Path.cwd())


def _settle_ports(folder: Path, settings: State, names: Sequence[str]) -> State:
    """Keep the remembered ports of the services `names`, except where a stranger took one."""
    ports = dict(settings.ports)
    for name in names:
        mark, port = servers.mark(name, folder), ports[name]
        if not process.is_taken_by_stranger(port, mark):
            continue
        # One of ours that could not get its port may linger, and would hold its data.
        process.stop([mark])
        ports[name] = process.free_port(port + 1, without=ports.values())
        log.warning("port %d is taken by another program: %s now uses port %d", port, TITLES[name], ports[name])
    settled = State(ports, settings.access_key, settings.secret_key)
    state.save(folder, settled)
    return settled


def _make_room(ours: Sequence[Server], given_s3: str | None, environ: Mapping[str, str]) -> None:
    for server in ours:
        server.data.mkdir(exist_ok=True)
        server.log.parent.mkdir(exist_ok=True)
        if server.name == "s3":
            for bucket in servers.BUCKETS:
                servers.create_bucket(server, bucket)
        root = servers.artifact_root(environ)
        if server.name == "mlflow" and given_s3 and root.startswith("s3://"):
            servers.create_bucket_elsewhere(given_s3, root)


def _start(ours: Sequence[Server]) -> bool:
    """Start those that don't run, all at once, and wait until every one answers. False: a stranger was faster at a port."""
    started: dict[str, Popen[bytes]] = {}
    for server in ours:
        running = process.members(server.mark)
        store = "MLFLOW_S3_ENDPOINT_URL"
        if running and server.name == "mlflow" and process.started_with(running, store) != server.environ.get(store):
            log.info("MLflow is restarted, because its S3 server moved")
            process.stop([server.mark])
        elif running:
            continue
        log.info("starting %s at %s", server.title, server.address)
        started[server.name] = server.start()
    waiting, began, said = list(ours), time.monotonic(), time.monotonic()
    while waiting:
        for server in list(waiting):
            if server.answers():
                waiting.remove(server)
                log.info("%s %s at %s", server.title, "is up" if server.name in started else "was already running", server.address)
            elif process.is_taken_by_stranger(server.port, server.mark):
                return False
            else:
                _check_alive(server, started.get(server.name), time.monotonic() - began)
        if waiting and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log.info("waiting for %s (%.0f s)", " and ".join(server.title for server in waiting), said - began)
        time.sleep(_SECONDS_BETWEEN_LOOKS if waiting else 0)
    return True


def _check_alive(server: Server, child: Popen[bytes] | None, seconds: float) -> None:
    """Raise where waiting longer for `server` is pointless."""
    if child is not None and child.poll() is not None:
        found = f"its process ended with exit code {child.returncode}"
    elif seconds > _START_SECONDS:
        found = f"no answer after {seconds:.0f} s"
    else:
        return
    # What is left of it would hold the port, or a lock on the data, against the next try.
    process.stop([server.mark])
    tail = "\n".join(f"    {line}" for line in server.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    raise ServiceError(
        f"{server.title}: expected an answer at http://127.0.0.1:{server.port}{server.health}, found {found}. "
        f"The last lines of {server.log}:\n{tail}\n"
        "Repair what they name, then run `vrt services up` again; the services that are up stay up."
    )


def _look(name: str, given: str | None, server: Server | None) -> ServiceState:
    if given:
        return ServiceState(name, without_credentials(given), "up" if servers.reachable(given) else "not answering", given=True)
    if server is None:
        return ServiceState(name, None, "down", given=False)
    running = process.members(server.mark)
    state_now = "down" if not running else "up" if server.answers() else "not answering"
    return ServiceState(name, server.address, state_now, False, running[0].pid if running else None, server.data, server.log)
