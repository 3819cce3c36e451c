"""What the machine is, and how busy it is, under the names that MLflow shows among a run's system metrics."""

import platform
import time
from pathlib import Path

import psutil
import torch

SECONDS_BETWEEN_SAMPLES = 10.0
MB = 1e6


def processor() -> str:
    """The model of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class MachineUse:
    """Samples the machine at most every SECONDS_BETWEEN_SAMPLES, since training steps may be short."""

    def __init__(self, folder: Path, device: torch.device):
        """`folder`: on the disk whose use is told."""
        self._folder, self._device = folder, device
        self._process = psutil.Process()
        self._sampled = -SECONDS_BETWEEN_SAMPLES
        # The first answer of each counts from here.
        psutil.cpu_percent()
        self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Percentages and megabytes, by metric; nothing where the last sample is too young."""
        if time.monotonic() - self._sampled < SECONDS_BETWEEN_SAMPLES:
            return {}
        self._sampled = time.monotonic()
        memory = psutil.virtual_memory()
        used = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage(str(self._folder)).percent,
            "trainer_cpu_percentage": self._process.cpu_percent(),
            "trainer_memory_megabytes": self._process.memory_info().rss / MB,
        }
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            used["gpu_0_memory_usage_megabytes"] = (total - free) / MB
            used["gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
        return {f"system/{name}": float(value) for name, value in used.items()}
