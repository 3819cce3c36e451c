"""How busy the machine is."""

import torch

from vrt import machine
from vrt.machine import MachineUse


def test_a_sample_has_mlflows_names_and_the_next_waits_its_time(tmp_path, monkeypatch):
    use = MachineUse(tmp_path, torch.device("cpu"))
    sample = use.sample()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= sample.keys()
    assert 0 < sample["system/system_memory_usage_percentage"] <= 100 and sample["system/trainer_memory_megabytes"] > 1
    assert use.sample() == {}
    monkeypatch.setattr(machine, "SECONDS_BETWEEN_SAMPLES", 0.0)
    assert use.sample().keys() == sample.keys()
