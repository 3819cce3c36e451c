"""What `vrt doctor` makes of what torch, the driver and the kernel say of NVIDIA GPUs."""

from dataclasses import replace

import pytest
import torch

from vrt.stages import graphics
from vrt.stages.finding import Finding
from vrt.stages.graphics import Graphics, driver_named, gpus_listed, judged, look

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."
USABLE = Graphics("2.11.0+cu130", "13.0", ("NVIDIA H100 80GB HBM3, 85 GB",) * 2, ("NVIDIA H100 80GB HBM3",) * 2, "580.95.05")
UNUSABLE = replace(USABLE, usable=(), driver="470.82.01", why_not=TOO_OLD)
NOT_GIVEN = replace(UNUSABLE, listed=(), why_not="No CUDA GPUs are available")


@pytest.mark.parametrize(
    "seen, finding",
    [
        (USABLE, Finding("processor", "ok", "2 x NVIDIA H100 80GB HBM3, 85 GB, driver 580.95.05, torch 2.11.0+cu130 for CUDA 13.0")),
        (
            replace(USABLE, listed=(), driver=None),
            Finding("processor", "ok", "2 x NVIDIA H100 80GB HBM3, 85 GB, driver unknown, torch 2.11.0+cu130 for CUDA 13.0"),
        ),
        (
            replace(UNUSABLE, torch="2.11.0+cpu", cuda=None, why_not="Torch not compiled with CUDA enabled"),
            Finding(
                "processor",
                "wrong",
                "NVIDIA H100 80GB HBM3, driver 470.82.01, but torch 2.11.0+cpu is a build without CUDA",
                "install the CUDA build of torch from PyPI; CUDA_VISIBLE_DEVICES= trains on the CPU",
            ),
        ),
        (
            UNUSABLE,
            Finding(
                "processor",
                "wrong",
                f"NVIDIA H100 80GB HBM3, driver 470.82.01, which torch 2.11.0+cu130 for CUDA 13.0 can't use: {TOO_OLD}",
                "install a driver for CUDA 13.0 or newer; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility; "
                "CUDA_VISIBLE_DEVICES= trains on the CPU",
            ),
        ),
        (
            NOT_GIVEN,
            Finding(
                "processor",
                "warning",
                "driver 470.82.01, but no GPU that this process may use: it would train on the CPU (No CUDA GPUs are available)",
                "a container needs `--gpus all`; elsewhere `nvidia-smi` says what ails the driver; CUDA_VISIBLE_DEVICES= trains on the CPU",
            ),
        ),
        (replace(NOT_GIVEN, torch="2.11.0+cpu", cuda=None), None),
        (replace(NOT_GIVEN, driver=None), None),
    ],
    ids=["usable", "usable, without nvidia-smi", "build for CPUs", "old driver", "not given", "CPUs are meant", "no GPU"],
)
def test_what_is_said_of_gpus(seen: Graphics, finding: Finding | None):
    assert judged(seen) == finding


def test_what_the_driver_writes_is_read():
    assert gpus_listed("NVIDIA H100 80GB HBM3, 580.95.05\nNVIDIA A100, 580.95.05\n") == [
        ("NVIDIA H100 80GB HBM3", "580.95.05"),
        ("NVIDIA A100", "580.95.05"),
    ]
    assert gpus_listed("No devices were found\n") == []
    compiler = "\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Tue Sep 14 19:00:00 UTC 2021"
    public = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22-I3)"
    assert [driver_named(text + compiler) for text in (closed, public, "")] == ["470.82.01", "580.95.05", "unknown"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes an `nvidia-smi` that answers as told, for a torch that can use no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def answers(script: str) -> Graphics:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return look()

    return answers


def test_gpus_that_the_driver_lists_are_seen_unless_they_are_hidden(machine, monkeypatch):
    listing = "echo 'NVIDIA H100 80GB HBM3, 470.82.01'"
    seen = machine(listing)
    assert (seen.usable, seen.listed, seen.driver) == ((), ("NVIDIA H100 80GB HBM3",), "470.82.01")
    assert judged(seen).state == "wrong"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert judged(machine(listing)) is None


def test_an_nvidia_smi_that_fails_or_hangs_is_a_sign_of_a_driver(machine, monkeypatch):
    monkeypatch.setattr(graphics, "SECONDS_TO_ANSWER", 0.5)
    for script in ("echo 'NVIDIA-SMI has failed, because'; exit 9", "exec /bin/sleep 60"):
        seen = machine(script)
        assert seen.listed == () and seen.driver


def test_a_gpu_that_torch_can_use_is_named(gpu):
    (first, *_) = look().usable
    assert torch.cuda.get_device_name(0) in first
