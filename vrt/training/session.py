"""Set-up of a training: build its state, restore it from a checkpoint, and hand its snapshots to the saver."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from vrt.checkpoint.errors import CheckpointError
from vrt.checkpoint.manifest import FileEntry, Manifest
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.saver import Saver
from vrt.checkpoint.serialize import fitting, load, misfits, optimizer_misfits
from vrt.checkpoint.snapshot import Aliases
from vrt.checkpoint.weights import AVERAGED, TRAINED, read_weights
from vrt.distributed import Team
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


@dataclass(frozen=True)
class Parts:
    """What a checkpoint holds of a training, read and known to fit its state."""

    weights: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any] | None
    """None: none that fits; it starts afresh."""
    history: History
    step: int


def read(state: TrainingState, manifest: Manifest, folder: Path) -> Parts:
    """Read a verified checkpoint for `state`, without changing it. Raises CheckpointError, naming everything that does not fit."""
    return Parts(
        load_fitting(folder / _name(manifest, NETWORK), state.network, TRAINED),
        load_fitting(folder / _name(manifest, EMA), state.ema) if state.ema is not None and _has(manifest, EMA) else None,
        load_optimizer(folder / _name(manifest, OPTIMIZER), state),
        read_history(folder / _name(manifest, HISTORY)),
        manifest.step,
    )


def read_what_fits(state: TrainingState, manifest: Manifest, folder: Path) -> tuple[Parts, list[str]]:
    """As `read`, for a fork, whose network may be another: takes what fits by name and shape, and lists the rest in words.

    Raises CheckpointError where none of the weights fits, or the file of weights or of metrics is damaged.
    """
    weights, left = fitting(read_weights(folder / _name(manifest, NETWORK), TRAINED).tensors, state.network.state_dict())
    if not weights:
        raise CheckpointError(f"{manifest.lineage} step {manifest.step}: none of its weights fits the network of the params file")
    ema = None
    if state.ema is not None and _has(manifest, EMA):
        ema, of_ema = fitting(read_weights(folder / _name(manifest, EMA)).tensors, state.ema.state_dict())
        left += [f"in E: {problem}" for problem in of_ema if problem not in left]
    optimizer = None
    try:
        optimizer = load_optimizer(folder / _name(manifest, OPTIMIZER), state)
    except CheckpointError as error:
        left.append(f"the optimizer starts afresh: {error}")
    return Parts(weights, ema, optimizer, read_history(folder / _name(manifest, HISTORY)), manifest.step), left


def put(state: TrainingState, parts: Parts) -> None:
    """Bring `state` to what was read. Without E it starts as a copy of G. What the parts don't have stays as it is."""
    _fill(state.network, parts.weights)
    if state.ema is not None:
        _fill(state.ema, state.network.state_dict() if parts.ema is None else parts.ema)
    if parts.optimizer is not None:
        state.optimizer.load_state_dict(parts.optimizer)
    state.history, state.step = parts.history, parts.step


def _fill(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    network.load_state_dict(network.state_dict() | dict(weights))


def restore(state: TrainingState, manifest: Manifest, folder: Path) -> None:
    """Put a verified checkpoint into `state`. Raises CheckpointError, naming everything that does not fit; `state` is unchanged then."""
    put(state, read(state, manifest, folder))


def load_optimizer(path: Path, state: TrainingState) -> dict[str, Any]:
    """An optimizer's state in a file, under the settings of `state`'s own: the params file rules, not what a checkpoint was made with.

    It comes to the CPU and goes from there to the device of each parameter, wherever and by whichever process it was written.
    Raises CheckpointError, naming each parameter whose state does not fit.
    """
    saved = load(path)
    names = {parameter: name for name, parameter in state.network.named_parameters()}
    groups = [[(names[parameter], parameter) for parameter in group["params"]] for group in state.optimizer.param_groups]
    problems = optimizer_misfits(saved, groups)
    if problems:
        raise CheckpointError(f"{path}: no optimizer state of this network:\n  {_listed(problems)}\nuse the params it was trained with")
    settings = state.optimizer.state_dict()["param_groups"]
    ours = [mine | {"params": theirs["params"]} for mine, theirs in zip(settings, saved["param_groups"])]
    return {"state": saved["state"], "param_groups": ours}


def load_fitting(path: Path, network: torch.nn.Module, first: str = AVERAGED) -> dict[str, torch.Tensor]:
    """The weights in a file (`read_weights`).

    Raises CheckpointError, naming every missing, unexpected and misshapen key, where they aren't `network`'s.
    """
    weights = read_weights(path, first).tensors
    problems = misfits(weights, network.state_dict())
    if problems:
        raise CheckpointError(
            f"{path}: {len(problems)} keys don't fit the network of the params file:\n  {_listed(problems)}\nuse the params it was trained with"
        )
    return weights


def read_history(path: Path) -> History:
    """The metrics that a checkpoint brings along. Raises CheckpointError where the file holds none."""
    try:
        return History.from_bytes(path.read_bytes())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no history of metrics, one JSON object a line ({error})") from error


def _listed(problems: list[str]) -> str:
    return "\n  ".join(problems)


def _has(manifest: Manifest, suffix: str) -> bool:
    return manifest.file(f"_{suffix}") is not None


def _name(manifest: Manifest, suffix: str) -> str:
    file = manifest.file(f"_{suffix}")
    if file is None:
        raise CheckpointError(f"{manifest.lineage} step {manifest.step}: the checkpoint has no {suffix}; a training can't continue from it")
    return file.name


def released(manifest: Manifest) -> FileEntry | None:
    """The weights of a checkpoint that people use: E where it was kept, else G; None: it has neither."""
    return manifest.file(f"_{EMA}") or manifest.file(f"_{NETWORK}")


def hand_out(state: TrainingState, team: Team) -> None:
    """Bring every process of the team to the state of the one that leads. E and history stay with that one, which alone needs them."""
    given = team.from_leader({"network": state.network.state_dict(), "optimizer": state.optimizer.state_dict(), "step": state.step})
    if not team.leads:
        state.network.load_state_dict(given["network"])
        state.optimizer.load_state_dict(given["optimizer"])
        state.step = given["step"]


class Unkept:
    """The `Checkpoints` of a process that follows another: that one keeps them."""

    def __init__(self, seen: Callable[[Row], None] = lambda row: None):
        """`seen` is called with each step's metrics."""
        self.send = seen

    def save(self, state: TrainingState, preview: bytes | None) -> None:
        """Nothing: the leader saves the same state."""

    def check(self) -> None:
        """Nothing can be wrong with saves that are not made."""

    def safe_step(self) -> int:
        """0: this process saves nothing."""
        return 0


class SnapshotSink:
    """The loop's `Checkpoints`: names the parts of the state as KAIR does and hands them to saver and publisher."""

    def __init__(
        self,
        saver: Saver,
        publisher: Publisher,
        facts: dict[str, Any],
        seen: Callable[[Row], None] = lambda row: None,
        machine: Callable[[], Row] = dict,
    ):
        """`seen` is called with each step's metrics; what `machine` measures is sent with them, but is no part of the training's history."""
        self._saver, self._publisher, self._facts, self._seen, self._machine = saver, publisher, facts, seen, machine
        self._networks: dict[str, Aliases] = {}
        self._constants: list[torch.Tensor] = []

    def save(self, state: TrainingState, preview: bytes | None) -> None:
        """Named as KAIR names them, with the history, the preview and the facts of this training beside them."""
        if not self._networks:
            # Steps write into the same tensors, and to name thousands of them takes a quarter of a save.
            networks = {NETWORK: state.network} | ({EMA: state.ema} if state.ema is not None else {})
            self._networks = {name: Aliases(network.state_dict()) for name, network in networks.items()}
            self._constants = [buffer for network in networks.values() for buffer in network.buffers()]
        tensors = {NETWORK: self._networks[NETWORK], OPTIMIZER: state.optimizer.state_dict()} | self._networks
        blobs = {HISTORY: state.history.to_bytes()} | ({PREVIEW: preview} if preview else {})
        origin = self._facts["origin"] | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
        facts = self._facts | {"origin": origin, "metrics": state.history.metrics_of(state.step)}
        self._saver.save(state.step, tensors, blobs, facts, self._constants)

    def check(self) -> None:
        """Raises SavesFail, FloatingPointError or LeaseLost, as saver or publisher found it."""
        reason = self._saver.must_stop or self._publisher.lost
        if reason:
            raise reason

    def safe_step(self) -> int:
        """Waits for the save at hand."""
        self._saver.wait()
        return self._saver.safe_step

    def send(self, row: Row) -> None:
        """In the background, with what the machine was doing meanwhile."""
        self._publisher.send(row | self._machine())
        self._seen(row)
