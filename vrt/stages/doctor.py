"""`vrt doctor`: whether everything that a training needs is there and works, and how to mend what does not. Takes seconds, changes nothing."""

import email.utils
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from vrt.checkpoint.curator import Curator, lineage_named
from vrt.checkpoint.errors import CheckpointError, StoreRefuses, StoreUnavailable
from vrt.checkpoint.store import S3Store
from vrt.data.cli import PREPARED, RAW
from vrt.data.clips import PreparedData
from vrt.data.errors import DataError
from vrt.data.sampler import check_sampling
from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_DONE, EXIT_UNAVAILABLE
from vrt.params import Params, load_params
from vrt.services.remote import dvc_remote
from vrt.stages import CHECKPOINTS
from vrt.stages.recipes import outline

# S3 refuses requests from a clock that is a quarter of an hour off; leases are judged by the local clock alone.
MOST_SECONDS_OFF = 60
SECONDS_TO_ANSWER = 5


@dataclass(frozen=True)
class Finding:
    """What was found of one thing that a training needs, and how to mend it."""

    subject: str
    state: Literal["ok", "warning", "wrong", "unavailable"]
    """A training starts in spite of a warning; `unavailable` may mend itself."""
    found: str
    remedy: str = ""


Check = Callable[[Params], Finding]


def run_doctor(params_path: Path, as_json: bool) -> int:
    """Look at everything, print what was found. Returns the exit code: 0 where a training can start, 69 where only services don't answer, else 2.

    Raises ParamsError where the params file is wrong.
    """
    params = load_params(params_path)
    findings = [check(params) for check in CHECKS]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    return verdict(findings)


def verdict(findings: list[Finding]) -> int:
    """The exit code that findings amount to."""
    states = {finding.state for finding in findings}
    return EXIT_BAD_INPUT if "wrong" in states else EXIT_UNAVAILABLE if "unavailable" in states else EXIT_DONE


def processor(params: Params) -> Finding:
    """The GPU, or that there is none; and one that torch can't use."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}, torch {torch.__version__}"
        return Finding("processor", "ok", found)
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True, check=False).returncode == 0:
        remedy = "install the CUDA build of torch from PyPI, or a newer driver"
        return Finding("processor", "wrong", f"an NVIDIA GPU that torch {torch.__version__} can't use", remedy)
    cores = len(os.sched_getaffinity(0))
    found = f"no NVIDIA GPU; {min(params.train.threads, cores)} of {cores} cores, torch {torch.__version__}"
    if params.train.threads > cores:
        return Finding("processor", "warning", f"train.threads is {params.train.threads}, but there are {cores} cores", f"set train.threads: {cores}")
    return Finding("processor", "ok", found)


def disk(params: Params) -> Finding:
    """Room for the checkpoints that are kept here, one that is being written and one that waits for its upload."""
    place = CHECKPOINTS if CHECKPOINTS.exists() else Path(".")
    free, needed = shutil.disk_usage(place).free, checkpoint_bytes(params) * (params.checkpoints.keep_last + params.checkpoints.keep_best + 2)
    found = f"{free / 1e9:.1f} GB free; the checkpoints kept here take up to {needed / 1e9:.1f} GB"
    if free < needed:
        return Finding("disk", "wrong", found, f"free space there ({place.resolve()}), or lower checkpoints.keep_last")
    return Finding("disk", "ok", found)


def checkpoint_bytes(params: Params) -> int:
    """G with its constants, E, and the two moments that Adam keeps of each parameter."""
    network = outline(params.network)
    trained = sum(value.nbytes for value in network.parameters())
    constants = sum(value.nbytes for value in network.buffers())
    copies = 2 if params.train.ema_decay else 1
    return copies * (trained + constants) + 2 * trained


def data(params: Params) -> Finding:
    """The data set of the params file: here, prepared, and large enough for them."""
    name = params.data.dataset
    if not PREPARED.exists():
        if (RAW / name / "dataset.yaml").exists():
            return Finding("data", "ok", f"data/raw/{name} is here, not prepared yet; `dvc repro` does that")
        return Finding("data", "wrong", f"no data set data/raw/{name}", "`vrt data import`, `dvc pull`, or set data.dataset")
    try:
        prepared = PreparedData.open(PREPARED)
        if prepared.index.dataset != name:
            return Finding("data", "ok", f"prepared clips are of {prepared.index.dataset}, not of {name}; `dvc repro` prepares that")
        check_sampling(prepared, params)
    except DataError as error:
        return Finding("data", "wrong", str(error), "`vrt data check` tells all that is wrong")
    return Finding("data", "ok", f"{name}: {len(prepared.index.clips)} clips, digest {prepared.digest[:12]}")


def mlflow(params: Params) -> Finding:
    """Whether MLflow answers and has room for the training."""
    registry = Curator(lineage_named(f"{params.name}-0"))
    try:
        address = registry.home()
    except StoreUnavailable as error:
        return Finding("MLflow", "unavailable", str(error), "`vrt services up`, or set MLFLOW_TRACKING_URI")
    except CheckpointError as error:
        return Finding("MLflow", "wrong", str(error))
    return Finding("MLflow", "ok", f"{os.environ['MLFLOW_TRACKING_URI']} answers; artifacts go to {address}")


def s3(params: Params) -> Finding:
    """The bucket of MLflow's artifacts, by writing, listing, reading and deleting."""
    try:
        address = Curator(lineage_named(f"{params.name}-0")).home()
    except (StoreUnavailable, CheckpointError):
        return Finding("S3", "unavailable", "where artifacts go is known to MLflow alone", "mend MLflow first")
    return _tried("S3", S3Store(f"{address}/doctor"), f"{address}/doctor")


def remote(params: Params) -> Finding:
    """The same for DVC's remote."""
    try:
        with dvc_remote(Path.cwd()) as found:
            if found is None:
                remedy = "`dvc remote add --default NAME s3://BUCKET`, or data and models stay on this machine"
                return Finding("DVC remote", "warning", "none at s3://", remedy)
            address, session = found
            return _tried("DVC remote", S3Store(f"{address}/doctor", session), f"{address}/doctor")
    except ValueError as error:
        return Finding("DVC remote", "wrong", str(error))


def _tried(subject: str, store: S3Store, address: str) -> Finding:
    """Really write, read, list and delete."""
    name = f"{address}/{time.time_ns()}"
    content = os.urandom(1024)
    try:
        store.put_beside(name, {"probe": content})
        back = store.beside(name)
        store.delete(name)
    except StoreRefuses as error:
        return Finding(subject, "wrong", str(error), "the key needs the rights to put, get, list and delete objects")
    except StoreUnavailable as error:
        return Finding(subject, "unavailable", str(error), "`vrt services up`, or mend the server that AWS_ENDPOINT_URL names")
    if back != {"probe": content}:
        return Finding(subject, "wrong", f"{address}: read back other bytes than were written", "use another store: this one loses checkpoints")
    return Finding(subject, "ok", f"{address.rsplit('/', 1)[0]}: an object was written, listed, read and deleted")


def clock(params: Params) -> Finding:
    """Beside that of MLflow's server, the one that always tells its time."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    try:
        with urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER) as answer:
            told = answer.headers.get("Date")
    except (OSError, ValueError):
        return Finding("clock", "warning", "no server tells the time", "mend MLflow first")
    if not told:
        return Finding("clock", "ok", "MLflow's server does not tell its time")
    off = time.time() - email.utils.parsedate_to_datetime(told).timestamp()
    if abs(off) > MOST_SECONDS_OFF:
        return Finding("clock", "wrong", f"{off:+.0f} s off that of {address}", "synchronise both by NTP: S3 refuses requests from a wrong clock")
    return Finding("clock", "ok", f"within {max(1, round(abs(off)))} s of MLflow's server")


def prefect(params: Params) -> Finding:
    """Whether Prefect answers; a training can do without."""
    address = os.environ.get("PREFECT_API_URL")
    if not address:
        return Finding("Prefect", "warning", "no address", "only deployments need it: `vrt services up`, or set PREFECT_API_URL")
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER):
            return Finding("Prefect", "ok", f"{address} answers")
    except urllib.error.HTTPError as error:
        return Finding("Prefect", "warning", f"{address} answers {error.code}", "check PREFECT_API_URL and PREFECT_API_KEY; only deployments need it")
    except (OSError, ValueError) as error:
        return Finding("Prefect", "warning", f"{address} does not answer ({error})", "only deployments need it: `vrt services up`")


def git(params: Params) -> Finding:
    """The commit that runs will name; a training can do without."""

    def asked(*words: str) -> str | None:
        ended = subprocess.run(["git", *words], capture_output=True, text=True, check=False) if shutil.which("git") else None
        return ended.stdout.strip() if ended and ended.returncode == 0 else None

    commit = asked("rev-parse", "--short", "HEAD")
    if commit is None:
        return Finding("git", "warning", "no git, or no commit, here", "runs will not name their code: `git init`, `git commit`")
    changed = asked("status", "--porcelain", "--untracked-files=no")
    return Finding("git", "ok", f"commit {commit}" + (", with changes, which runs keep as a diff" if changed else ""))


CHECKS: tuple[Check, ...] = (processor, disk, data, mlflow, s3, remote, clock, prefect, git)


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
