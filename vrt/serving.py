"""A registered checkpoint as MLflow's `pyfunc` loads it: clip in, clip out, for people who have nothing of this project.

This file travels with each checkpoint, with the network and the tiling it needs, and so imports nothing else of ours.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vrt.data.degradations import continue_backwards
from vrt.evaluation.between import Interpolating, group
from vrt.evaluation.tiling import AnySize, restore
from vrt.model.network import VRT

SETTINGS = "predictor.json"


class Predictor:
    """A restored clip for a degraded one, on a GPU where there is one."""

    def __init__(self, network: VRT, settings: Mapping[str, Any]):
        self._settings = settings
        self._interpolates = settings["network"]["pa_frames"] == 0
        self._frames = settings["network"]["img_size"][0]
        self._network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def predict(self, clip: np.ndarray, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """float32 (D, H, W, 3) in 0 to 1 -> float32 (D, H x upscale, W x upscale, 3) in 0 to 1; of a network that makes frames in between,
        those frames alone: one fewer for each frame it looks at beside the first.

        `params["sigma"]`, for a network that wants to be told: the noise in grey levels, 0 to 255.
        Raises ValueError where the clip has another form, or too few frames.
        """
        clip = np.asarray(clip)
        least = self._frames if self._interpolates else 1
        if clip.ndim != 4 or clip.shape[-1] != 3 or len(clip) < least:
            raise ValueError(f"clip: expected frames x height x width x 3 with at least {least} frames, values 0 to 1, found shape {clip.shape}")
        given = torch.from_numpy(np.ascontiguousarray(clip, np.float32)).permute(0, 3, 1, 2)[None]
        network: torch.nn.Module = self._network
        if self._interpolates:
            given, network = group(given, self._frames), Interpolating(network, self._frames)
        if self._settings["network"]["nonblind_denoising"]:
            sigma = float((params or {}).get("sigma", self._settings["sigma"])) / 255
            given = torch.cat([given, torch.full_like(given[:, :, :1], sigma)], dim=2)
        frames, upscale = given.shape[1], self._settings["network"]["upscale"]
        # A clip shorter than the windows goes on backwards, as in training.
        if not self._interpolates:
            given = continue_backwards(given, self._frames)
        restored = restore(AnySize(network, upscale), given, self._settings["tile"], self._settings["overlap"], upscale)
        return restored[0, :frames].clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _load_pyfunc(path: str) -> Predictor:
    """What MLflow calls with the folder of a checkpoint. Raises ValueError where the weights are not those that were registered."""
    folder = Path(path)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    weights = folder / settings["weights"]
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != settings["sha256"]:
        raise ValueError(f"{weights}: expected SHA-256 {settings['sha256']}, found {found}: it was changed or cut; download it again")
    network = VRT(**settings["network"])
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return Predictor(network, settings)
