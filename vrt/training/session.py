"""Set-up of a training: build its state, restore it from a checkpoint, and hand its snapshots to the saver."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.saver import Saver
from vrt.checkpoint.serialize import load, misfits
from vrt.checkpoint.snapshot import Aliases
from vrt.checkpoint.weights import read_weights
from vrt.model.network import VRT
from vrt.params import Network, Params
from vrt.training.ema import copy_for_ema
from vrt.training.history import History, Row
from vrt.training.loop import TrainingState
from vrt.training.optim import make_optimizer

NETWORK, EMA, OPTIMIZER, HISTORY, PREVIEW = "G.pth", "E.pth", "optimizerG.pth", "history.jsonl", "preview.png"


def build_network(settings: Network, activation_checkpointing: bool = False) -> VRT:
    """The network of the params file, freshly initialised from torch's generator."""
    return VRT(**settings.model_dump(), use_checkpoint=activation_checkpointing)


def build_state(params: Params, device: torch.device) -> TrainingState:
    """The state before step 1, a function of the seed."""
    torch.manual_seed(params.seed)
    network = build_network(params.network, params.train.activation_checkpointing).to(device)
    ema = copy_for_ema(network) if params.train.ema_decay else None
    return TrainingState(network, ema, make_optimizer(network, params.optimizer), History(), 0)


def restore(state: TrainingState, manifest: Manifest, folder: Path) -> None:
    """Put a verified checkpoint into `state`. Raises CheckpointError, naming every key that does not fit; `state` is then unusable."""
    weights = load_fitting(folder / _name(manifest, NETWORK), state.network)
    state.network.load_state_dict(weights)
    if state.ema is not None:
        state.ema.load_state_dict(load_fitting(folder / _name(manifest, EMA), state.ema) if _has(manifest, EMA) else weights)
    path = folder / _name(manifest, OPTIMIZER)
    optimizer = load(path)
    try:
        state.optimizer.load_state_dict(optimizer)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no optimizer state of this network ({error})") from error
    state.history = History.from_bytes((folder / _name(manifest, HISTORY)).read_bytes())
    state.step = manifest.step


def load_fitting(path: Path, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights in a file. Raises CheckpointError, naming every missing, unexpected and misshapen key, where they aren't `network`'s."""
    weights = read_weights(path).tensors
    problems = misfits(weights, network.state_dict())
    if problems:
        shown = "\n  ".join(problems[:20])
        raise CheckpointError(
            f"{path}: {len(problems)} keys don't fit the network of the params file:\n  {shown}\nuse the params it was trained with"
        )
    return weights


def _has(manifest: Manifest, suffix: str) -> bool:
    return manifest.file(f"_{suffix}") is not None


def _name(manifest: Manifest, suffix: str) -> str:
    file = manifest.file(f"_{suffix}")
    if file is None:
        raise CheckpointError(f"{manifest.lineage} step {manifest.step}: the checkpoint has no {suffix}; a training can't continue from it")
    return file.name


class SnapshotSink:
    """The loop's `Checkpoints`: names the parts of the state as KAIR does and hands them to saver and publisher."""

    def __init__(self, saver: Saver, publisher: Publisher, facts: dict[str, Any]):
        self._saver, self._publisher, self._facts = saver, publisher, facts
        self._networks: dict[str, Aliases] = {}
        self._constants: list[torch.Tensor] = []

    def save(self, state: TrainingState, preview: bytes | None) -> None:
        if not self._networks:
            # Steps write into the same tensors, and to name thousands of them takes a quarter of a save.
            networks = {NETWORK: state.network} | ({EMA: state.ema} if state.ema is not None else {})
            self._networks = {name: Aliases(network.state_dict()) for name, network in networks.items()}
            self._constants = [buffer for network in networks.values() for buffer in network.buffers()]
        tensors = {NETWORK: self._networks[NETWORK], OPTIMIZER: state.optimizer.state_dict()} | self._networks
        blobs = {HISTORY: state.history.to_bytes()} | ({PREVIEW: preview} if preview else {})
        origin = self._facts["origin"] | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        self._saver.save(state.step, tensors, blobs, self._facts | {"origin": origin, "metrics": state.history.newest()}, self._constants)

    def check(self) -> None:
        reason = self._saver.must_stop or self._publisher.lost
        if reason:
            raise reason

    def safe_step(self) -> int:
        self._saver.wait()
        return self._saver.safe_step

    def send(self, row: Row) -> None:
        self._publisher.send(row)
