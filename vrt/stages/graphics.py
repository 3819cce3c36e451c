"""The NVIDIA GPUs of this machine, as its driver and torch see them, and what follows from that."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from vrt.stages.finding import Finding

# The driver may be loaded for this one question, which takes seconds for each GPU.
SECONDS_TO_ANSWER = 30
ON_THE_CPU = "CUDA_VISIBLE_DEVICES= trains on the CPU"


@dataclass(frozen=True)
class Graphics:
    """What was found of NVIDIA GPUs."""

    torch: str
    """The version of torch."""
    cuda: str | None
    """The version of CUDA that torch was built for; None: a build for CPUs."""
    usable: tuple[str, ...]
    """Each GPU that torch can use, in words."""
    listed: tuple[str, ...]
    """The GPUs that the driver shows to this process, by name."""
    driver: str | None
    """The driver's version; None: there is no sign of one."""
    why_not: str = ""
    """Why torch can use none."""


def judged(seen: Graphics) -> Finding | None:
    """What is to be said of the GPUs; None: there are none here, or torch is not meant to use them."""
    if seen.usable:
        found = f"{len(seen.usable)} x {seen.usable[0]}, driver {seen.driver or 'unknown'}, torch {seen.torch} for CUDA {seen.cuda}"
        return Finding("processor", "ok", found)
    if seen.listed and seen.cuda is None:
        found = f"{seen.listed[0]}, driver {seen.driver}, but torch {seen.torch} is a build without CUDA"
        return Finding("processor", "wrong", found, f"install the CUDA build of torch from PyPI; {ON_THE_CPU}")
    if seen.listed:
        found = f"{seen.listed[0]}, driver {seen.driver}, which torch {seen.torch} for CUDA {seen.cuda} can't use: {seen.why_not}"
        remedy = f"install a driver for CUDA {seen.cuda} or newer; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility; {ON_THE_CPU}"
        return Finding("processor", "wrong", found, remedy)
    if seen.driver and seen.cuda:
        found = f"driver {seen.driver}, but no GPU that this process may use: it would train on the CPU ({seen.why_not})"
        remedy = f"a container needs `--gpus all`; elsewhere `nvidia-smi` says what ails the driver; {ON_THE_CPU}"
        return Finding("processor", "warning", found, remedy)
    return None


def look() -> Graphics:
    """Ask torch, nvidia-smi and the kernel."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usable = tuple(f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in map(torch.cuda.get_device_properties, range(count)))
    if not usable and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        # Hidden by whoever started this.
        return Graphics(torch.__version__, torch.version.cuda, (), (), None)
    rows = _asked_nvidia_smi()
    driver = rows[0][1] if rows else _loaded_driver()
    return Graphics(torch.__version__, torch.version.cuda, usable, tuple(name for name, _ in rows), driver, "" if usable else _why_not())


def _asked_nvidia_smi() -> list[tuple[str, str]]:
    """(name, driver's version) of each GPU; none where it is not installed, or fails."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS_TO_ANSWER)
    except subprocess.TimeoutExpired:
        return []
    return gpus_listed(ended.stdout) if ended.returncode == 0 else []


def gpus_listed(answer: str) -> list[tuple[str, str]]:
    """(name, driver's version) of each GPU in an answer of nvidia-smi."""
    return [(name.strip(), driver.strip()) for name, _, driver in (line.rpartition(",") for line in answer.splitlines()) if name]


def _loaded_driver() -> str | None:
    """The version of the driver in the kernel, which a container shares with its host."""
    try:
        return driver_named(Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "that `nvidia-smi` can't reach" if shutil.which("nvidia-smi") else None


def driver_named(text: str) -> str:
    """The version in what the driver writes below /proc, which has a line such as `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  ...`."""
    found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def _why_not() -> str:
    """In torch's own words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it found none"
