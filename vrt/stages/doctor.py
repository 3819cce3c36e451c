"""`vrt doctor`: whether everything that a training needs is there and works, and how to mend what does not. Takes seconds, changes nothing."""

import http.client
import json
import os
import shutil
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError, ClockRefused, StoreRefuses, StoreUnavailable
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import CHECK_MLFLOW
from vrt.data.cli import PREPARED, RAW
from vrt.data.clips import PreparedData
from vrt.data.errors import DataError
from vrt.data.sampler import check_sampling
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE, EXIT_UNAVAILABLE, within
from vrt.observe import without_credentials
from vrt.params import Params, load_params
from vrt.services.remote import dvc_remote
from vrt.stages import graphics
from vrt.stages.finding import Finding
from vrt.stages.provenance import THE_CODE
from vrt.stages.room import disk, memory
from vrt.stages.together import processes_here

# S3 refuses requests from a clock that is a quarter of an hour off; leases are judged by the local clock alone.
MOST_SECONDS_OFF = 60
SECONDS_TO_ANSWER = 5
SECONDS_FOR_A_STORE = 15
"""For several questions, one after another."""
SYNCHRONISE = "synchronise this clock and the server's by NTP: S3 refuses requests from a wrong clock"


def run_doctor(params_path: Path, processes: int | str | None, machines: int, as_json: bool, before_preparing: bool) -> int:
    """Look at everything, print what was found. Returns the exit code: 0 where a training can start, 69 where only waiting may help, else 2.

    `processes` on each of `machines` are to train; None: as many as the params say. Raises ParamsError where the params file is wrong.
    """
    params = load_params(params_path)
    if processes is not None:
        params = params.model_copy(update={"train": params.train.model_copy(update={"processes": processes})})
    findings = examine(params, machines, before_preparing)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    return verdict(findings)


def examine(params: Params, machines: int, before_preparing: bool) -> list[Finding]:
    """All findings. `before_preparing`: clips that were prepared earlier are about to be replaced, so that they don't count."""
    homes: list[str | None] = []

    def of_mlflow() -> Finding:
        finding, home = mlflow(params)
        homes.append(home)
        return finding

    of_data = raw_data(params) if before_preparing else data(params)
    of_processes, here = processes(params, machines)
    found = [processor(params), *([compiler()] if params.train.compile else []), of_processes, memory(params, here, machines), disk(params), of_data]
    found.append(in_time("MLflow", of_mlflow))
    (home,) = homes or [None]
    found += [in_time("S3", lambda: s3(home)), in_time("DVC remote", remote)]
    return [*found, in_time("clock", lambda: clock(home)), prefect(), git()]


def in_time(subject: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds of a service, or that there was no answer in time."""
    found: list[Finding] = []
    if within(SECONDS_FOR_A_STORE, lambda: found.append(look())):
        return found[0]
    remedy = "see whether that server is overloaded, or a firewall between drops what is sent to it"
    return Finding(subject, "unavailable", f"no answer within {SECONDS_FOR_A_STORE} s", remedy)


def verdict(findings: list[Finding]) -> int:
    """The exit code that findings amount to."""
    states = {finding.state for finding in findings}
    return EXIT_BAD_INPUT if "wrong" in states else EXIT_UNAVAILABLE if "unavailable" in states else EXIT_DONE


def processor(params: Params) -> Finding:
    """The GPUs, or that there is none."""
    if of_gpus := graphics.judged(graphics.look()):
        return of_gpus
    cores = len(os.sched_getaffinity(0))
    found = f"no NVIDIA GPU; {min(params.train.threads, cores)} of {cores} cores, torch {torch.__version__}"
    if params.train.threads > cores:
        return Finding("processor", "warning", f"train.threads is {params.train.threads}, but there are {cores} cores", f"set train.threads: {cores}")
    return Finding("processor", "ok", found)


def compiler() -> Finding:
    """Whether what `train.compile` needs is here, by which the compiler makes for a GPU what launches its kernels, and for a CPU the kernels."""
    language, variable, names = ("C", "CC", ("gcc", "clang")) if torch.cuda.is_available() else ("C++", "CXX", ("g++",))
    given = os.environ.get(variable)
    there = [path for name in ([given] if given else names) if (path := shutil.which(name))]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    missing = []
    if not there:
        looked_for = f"${variable} names {given}" if given else f"{' or '.join(names)}, or what ${variable} names"
        missing.append(f"no {language} compiler ({looked_for})")
    if not headers.exists():
        missing.append(f"no {headers}")
    if missing:
        remedy = "`apt-get install gcc g++ python3-dev`, in a container in an image of your own, or set train.compile: false"
        return Finding("compiler", "wrong", f"train.compile: true, but there is {' and '.join(missing)}", remedy)
    return Finding("compiler", "ok", f"{there[0]}, and Python's headers")


def processes(params: Params, machines: int) -> tuple[Finding, int]:
    """Whether as many processes as asked for can share a batch, and have a GPU each where there are some; and how many train here."""
    try:
        count = processes_here(params, params.train.processes, machines)
    except ValueError as error:
        found, _, remedy = str(error).rpartition("; ")
        return Finding("processes", "wrong", found, remedy), 1
    on = f" on each of {machines} machines" if machines > 1 else ""
    return Finding("processes", "ok", f"{count}{on}; clips a step, of all together: {params.train.batch_size}"), count


def data(params: Params) -> Finding:
    """The data set of the params file: prepared and large enough for them, or here to be prepared."""
    try:
        prepared = PreparedData.open(PREPARED) if PREPARED.exists() else None
        if prepared is None or prepared.index.dataset != params.data.dataset:
            return raw_data(params)
        check_sampling(prepared, params)
    except DataError as error:
        return Finding("data", "wrong", str(error), "`vrt data check` tells all that is wrong")
    return Finding("data", "ok", f"{prepared.index.dataset}: {len(prepared.index.clips)} clips, digest {prepared.digest[:12]}")


def raw_data(params: Params) -> Finding:
    """The same before it is prepared."""
    raw = RAW / params.data.dataset
    if (raw / "dataset.yaml").exists():
        return Finding("data", "ok", f"{raw} is here; `dvc repro` prepares it")
    described = raw.with_name(f"{raw.name}.dvc")
    if described.exists():
        return Finding("data", "warning", f"{raw} is not here yet", f"`dvc pull {described}`, which the flow `train` does by itself")
    return Finding("data", "wrong", f"no data set {raw}", "`vrt data import`, `dvc pull`, or set data.dataset")


def mlflow(params: Params) -> tuple[Finding, str | None]:
    """Whether MLflow answers and has room for the training; and where artifacts go, which it alone knows."""
    try:
        home = Curator(lineage_named(f"{params.name}-0")).home()
    except StoreRefuses as error:
        return Finding("MLflow", "wrong", str(error).removesuffix(f"; {CHECK_MLFLOW}"), CHECK_MLFLOW), None
    except StoreUnavailable as error:
        return Finding("MLflow", "unavailable", str(error), "`vrt services up`, or set MLFLOW_TRACKING_URI"), None
    except CheckpointError as error:
        return Finding("MLflow", "wrong", str(error), "start MLflow with `--default-artifact-root s3://BUCKET` and rename that experiment"), None
    return Finding("MLflow", "ok", f"{without_credentials(os.environ['MLFLOW_TRACKING_URI'])} answers; artifacts go to {home}"), home


def s3(home: str | None) -> Finding:
    """The bucket of MLflow's artifacts, by writing, listing, reading and deleting."""
    if home is None:
        return Finding("S3", "unavailable", "where artifacts go is known to MLflow alone", "mend MLflow first")
    return _tried("S3", S3Store(f"{home}/doctor"), f"{home}/doctor")


def remote() -> Finding:
    """The same for DVC's remote."""
    try:
        with dvc_remote(Path.cwd()) as found:
            if found is None:
                remedy = "`dvc remote add --default NAME s3://BUCKET`, or data and models stay on this machine"
                return Finding("DVC remote", "warning", "none at s3://", remedy)
            address, session = found
            return _tried("DVC remote", S3Store(f"{address}/doctor", session), f"{address}/doctor")
    except ValueError as error:
        return Finding("DVC remote", "wrong", str(error), "correct .dvc/config or .dvc/config.local")


def _tried(subject: str, store: S3Store, address: str) -> Finding:
    """Really write, read, list and delete."""
    name = f"{address}/{time.time_ns()}"
    content = os.urandom(1024)
    try:
        store.put_beside(name, {"probe": content})
        back = store.beside(name)
        store.delete(name)
    except ClockRefused as error:
        return Finding(subject, "wrong", str(error), SYNCHRONISE)
    except StoreRefuses as error:
        return Finding(subject, "wrong", str(error), "the key needs the rights to put, get, list and delete objects")
    except StoreUnavailable as error:
        return Finding(subject, "unavailable", str(error), "`vrt services up`, or mend the server that AWS_ENDPOINT_URL names")
    if back != {"probe": content}:
        return Finding(subject, "wrong", f"{address}: read back other bytes than were written", "use another store: this one loses checkpoints")
    return Finding(subject, "ok", f"{address.rsplit('/', 1)[0]}: an object was written, listed, read and deleted")


def clock(home: str | None) -> Finding:
    """Beside those of S3, which refuses requests from a wrong clock, and of MLflow's server."""
    ahead = {"S3": _ahead_of_s3(home), "MLflow's server": _ahead_of_mlflow()}
    told = {server: seconds for server, seconds in ahead.items() if seconds is not None}
    if not told:
        return Finding(
            "clock", "warning", "no server tells the time", "mend MLflow and S3 first, or see in `timedatectl` whether NTP keeps this clock"
        )
    server, most = max(told.items(), key=lambda each: abs(each[1]))
    if abs(most) > MOST_SECONDS_OFF:
        return Finding("clock", "wrong", f"{most:+.0f} s off that of {server}", SYNCHRONISE)
    return Finding("clock", "ok", f"within {max(1, round(abs(most)))} s of {' and '.join(told)}")


def _ahead_of_s3(home: str | None) -> float | None:
    try:
        return S3Store(home).seconds_ahead() if home else None
    except (StoreUnavailable, CheckpointError):
        return None


def _ahead_of_mlflow() -> float | None:
    try:
        with urllib.request.urlopen(without_credentials(os.environ.get("MLFLOW_TRACKING_URI", "")), timeout=SECONDS_TO_ANSWER) as answer:
            told = answer.headers.get("Date")
    except (OSError, ValueError, http.client.InvalidURL):
        return None
    return time.time() - parsedate_to_datetime(told).timestamp() if told else None


def prefect() -> Finding:
    """Whether Prefect answers; a training can do without."""
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        return Finding("Prefect", "warning", "no address", "only deployments need it: `vrt services up`, or set PREFECT_API_URL")
    shown = without_credentials(address)
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER):
            return Finding("Prefect", "ok", f"{shown} answers")
    except urllib.error.HTTPError as error:
        return Finding("Prefect", "warning", f"{shown} answers {error.code}", "check PREFECT_API_URL and PREFECT_API_KEY; only deployments need it")
    except http.client.InvalidURL:
        return Finding("Prefect", "warning", "PREFECT_API_URL is no address", "it looks like http://HOST:4200/api; only deployments need it")
    except (OSError, ValueError) as error:
        return Finding("Prefect", "warning", f"{shown} does not answer ({error})", "only deployments need it: `vrt services up`")


def git() -> Finding:
    """The commit that runs will name; a training can do without."""

    def asked(*words: str) -> str | None:
        ended = subprocess.run(["git", *words], capture_output=True, text=True, check=False) if shutil.which("git") else None
        return ended.stdout.strip() if ended and ended.returncode == 0 else None

    commit = asked("rev-parse", "--short", "HEAD")
    if commit is None:
        return Finding("git", "warning", "no git, or no commit, here", "runs will not name their code: `git init`, `git commit`")
    changed = asked("status", "--porcelain", "--untracked-files=no", *THE_CODE)
    return Finding("git", "ok", f"commit {commit}" + (", with changes, which runs keep as a diff" if changed else ""))


def show(findings: list[Finding]) -> None:
    """Findings as a table, and below it whether a training can start."""
    table = Table("", "found", "to mend it", show_lines=False)
    styles = {"ok": "green", "warning": "yellow", "wrong": "bold red", "unavailable": "bold red"}
    for finding in findings:
        table.add_row(f"[{styles[finding.state]}]{finding.subject}[/]", finding.found, finding.remedy)
    console = Console()
    console.print(table)
    broken = [finding.subject for finding in findings if finding.state in ("wrong", "unavailable")]
    if broken:
        console.print(f"a training can't start yet: {', '.join(broken)}", style="bold red")
    else:
        console.print("a training can start", style="bold green")
