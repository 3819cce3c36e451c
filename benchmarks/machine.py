"""What a measurement was made on, in words that tell nothing else about the machine."""

import os
import platform

import torch

from vrt.machine import processor


def describe() -> dict[str, str]:
    """Platform, processor, cores, torch and its threads, and the accelerator, if there is one."""
    facts = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    return facts | ({"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
