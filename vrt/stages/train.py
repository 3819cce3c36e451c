"""`vrt train`: continue the lineage of the params file from its newest healthy checkpoint, and keep everything safe meanwhile."""

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from vrt.checkpoint.claims import claims_on
from vrt.checkpoint.curator import Curator
from vrt.checkpoint.errors import StoreUnavailable, exit_code_of
from vrt.checkpoint.folder import CheckpointFolder
from vrt.checkpoint.lease import Lease
from vrt.checkpoint.lock import locked
from vrt.checkpoint.manifest import Manifest
from vrt.checkpoint.policy import ResumePolicy
from vrt.checkpoint.publisher import Publisher
from vrt.checkpoint.retention import prune
from vrt.checkpoint.saver import Saver
from vrt.checkpoint.store import S3Store
from vrt.checkpoint.tracking import Lineage
from vrt.data.clips import PreparedData
from vrt.data.loading import training_batches
from vrt.data.sampler import Share, check_sampling
from vrt.distributed import PeerLost, Team, device_here, joined
from vrt.evaluation.pictures import png, preview
from vrt.evaluation.run import Evaluation, validate
from vrt.lifecycle import EXIT_CONTINUE_ME, EXIT_DONE, EXIT_FAILED, EXIT_UNAVAILABLE, StopRequest, within
from vrt.machine import MachineUse
from vrt.model.block import compile_blocks
from vrt.model.precision import computing
from vrt.observe import log
from vrt.params import Params, fingerprint, flatten, load_params, with_resume
from vrt.stages import CHECKPOINTS, PREPARED
from vrt.stages.lineage import lineage_of, origin_here
from vrt.stages.predictor import predictor_files
from vrt.stages.provenance import code_digest, code_version, collect, folder_of
from vrt.stages.result import changed_meanwhile, leave_result
from vrt.stages.run_page import about_checkpoints, run_page
from vrt.stages.start import refuse_surprise, resume
from vrt.status import STATUS, StatusFile, TrainingStatus
from vrt.training.determinism import determinism
from vrt.training.history import History
from vrt.training.loop import Checkpoints, TrainingState, Validation, train
from vrt.training.memory import clips_at_once
from vrt.training.session import SnapshotSink, Unkept, build_state, hand_out

# A finished training has time to wait for a store that is down; one that was told to stop has not (see `Publisher.finish`).
SECONDS_TO_PUBLISH = 600.0
SECONDS_TO_CLOSE = 10.0
"""For the run's status, where there is no time: with SECONDS_TO_WIND_UP and what `Publisher.finish` and `Lease.release` take, less than
SECONDS_TO_SAVE."""


@dataclass
class Keeper:
    """What keeps one attempt's checkpoints: the folder, what publishes from it, the registry, and the right to do so."""

    lease: Lease
    folder: CheckpointFolder
    store: S3Store
    registry: Curator
    publisher: Publisher
    saver: Saver
    status: StatusFile
    history: History = field(default_factory=History)
    """That of the training, once it is known where it goes on."""


def run_training(params_path: Path, resume_from: str | None = None) -> int:
    """Train to the end of the params file; `resume_from` overrides its `checkpoints.resume`. Returns the exit code of `vrt.lifecycle`.

    Raises ValueError (params, data, checkpoints) or RuntimeError (lock, services), whose messages are for the user.
    """
    started = time.time()
    params = written = load_params(params_path)
    if resume_from is not None:
        params = with_resume(params, resume_from)
    data = PreparedData.open(PREPARED)
    check_sampling(data, params)
    torch.set_num_threads(params.train.threads)
    lineage = lineage_of(params, data)
    device = device_here()
    with StopRequest() as stop, determinism(params.train.deterministic), computing(params.train.precision), joined(device) as team:
        training = Training(params, written, params_path, data, lineage, device, team, stop)
        try:
            return train_in_team(training, started)
        except PeerLost as lost:
            # A leader that can't begin is no crash of the others: whoever launched them would give up after three.
            if (code := team.word_of_leader()) is None:
                raise
            log.error("%s", lost)
            return code
        except Exception as error:
            team.leave_word(exit_code_of(error))
            raise


@dataclass(frozen=True)
class Training:
    """What an attempt is given."""

    params: Params
    written: Params
    """What the params file said, without what the command line overrides."""
    params_path: Path
    data: PreparedData
    lineage: Lineage
    device: torch.device
    team: Team
    stop: StopRequest


def train_in_team(training: Training, started: float) -> int:
    """Do this process's part. Nobody ends before the one that leads has everything registered; then all end as that one does."""
    params, data, team = training.params, training.data, training.team
    version = f"{code_version()} ({code_digest()})"
    team.check_same({"params": fingerprint(params.model_dump(mode="json")), "data": data.digest, "torch": torch.__version__, "code": version})
    team.connect(training.device)
    if not team.leads:
        return follow(training, started)
    code = lead(training, started)
    try:
        return team.from_leader(code)
    except PeerLost as lost:
        if code != EXIT_DONE:
            raise
        # Nothing is left to do, here or where the others are started again.
        log.warning("%s", lost)
        return code


def lead(training: Training, started: float) -> int:
    """Train as the one process that saves, publishes, validates and speaks to the services.

    Raises RuntimeError where the last state could not be saved.
    """
    params, lineage, team, stop = training.params, training.lineage, training.team, training.stop
    policy = ResumePolicy.parse(params.checkpoints.resume)
    with locked(CHECKPOINTS), ExitStack() as at_the_end:
        refuse_surprise(lineage, policy)
        registry = Curator(lineage)
        registry.find_or_create(flatten(params.model_dump(mode="json")) | lineage.identity)
        lease = Lease(claims_on(registry), lineage.id)
        if not lease.take(give_up=lambda: stop.reason is not None):
            team.from_leader(None)
            return EXIT_CONTINUE_ME
        at_the_end.callback(lease.release)
        with keeping(registry, lease, params, started, team.size) as keeper:
            team.from_leader(asdict(keeper.status.now))
            keeper.publisher.put_beside(folder_of(registry.artifacts_address, registry.attempt), collect(training.params_path))
            state = build_state(params, training.device)
            at_the_end.enter_context(keeper.status.reporting(lambda: state.step))
            going_on = resume(state, keeper.folder, keeper.store, keeper.registry, policy, params.train.total_steps, keeper.publisher.note)
            keeper.saver.safe_step, keeper.history = state.step, state.history
            if going_on:
                catch_up(keeper)
            hand_out(state, team)
            keeper.status.begins(state.step)
            machine = MachineUse(CHECKPOINTS, training.device).sample
            sink = SnapshotSink(keeper.saver, keeper.publisher, facts(lineage, keeper.registry), keeper.status.seen, machine)
            done = train_from(state, training, sink)
            keeper.saver.wait()
            sink.check()
            if keeper.saver.failure:
                raise RuntimeError(
                    f"the state after step {state.step} is not saved: {keeper.saver.failure}; run the same again: it goes on after step "
                    f"{keeper.saver.safe_step}"
                )
        # Not done: this process or another of the training was told to stop.
        code = conclude(keeper, "FINISHED" if done else "KILLED", lambda: not done or stop.reason is not None)
        if not done or (code != EXIT_DONE and stop.reason is not None):
            return EXIT_CONTINUE_ME
        if code != EXIT_DONE:
            return code
        if changed_meanwhile(training.params_path, training.written, lineage):
            return EXIT_CONTINUE_ME
        leave_result(keeper.folder, state.step, state.history)
        log.info("step %d of %s trained and registered; browse it at %s", state.step, lineage.id, keeper.registry.page)
    return EXIT_DONE


def follow(training: Training, started: float) -> int:
    """Train beside the process that leads: the same steps, on another share of each batch. It saves nothing and speaks to nobody.

    But the first process of another machine says there how the training stands.
    """
    team = training.team
    told = team.from_leader(None)
    if told is None:
        return team.from_leader(None)
    state = build_state(training.params, training.device)
    # Only what the leader saves and validates has an average.
    state.ema = None
    hand_out(state, team)
    with ExitStack() as at_the_end:
        unkept = Unkept()
        if team.first_away:
            CHECKPOINTS.mkdir(exist_ok=True)
            status = StatusFile(STATUS, replace(TrainingStatus(**told), started=started))
            at_the_end.enter_context(status.reporting(lambda: state.step))
            status.begins(state.step)
            unkept = Unkept(status.seen)
        train_from(state, training, unkept)
        return team.from_leader(None)


def train_from(state: TrainingState, training: Training, checkpoints: Checkpoints) -> bool:
    """Train on from `state`; False: stopped early."""
    params, data, team = training.params, training.data, training.team
    share = Share(team.rank, team.size)

    def validation(network: torch.nn.Module) -> Validation:
        return validated(validate(network, data, params, after_tile=training.stop.heed))

    at_once = clips_at_once(params, state, share, data, team)
    if params.train.compile:
        compile_blocks(state.network)
    with closing(training_batches(data, params, state.step + 1, params.train.total_steps, share)) as batches:
        return train(params, state, batches, checkpoints, validation, training.stop, team, at_once)


@contextmanager
def keeping(registry: Curator, lease: Lease, params: Params, started: float, processes: int) -> Iterator[Keeper]:
    """Begin an attempt and keep publishing while the block runs. If the block fails, what is committed is still published."""
    folder = CheckpointFolder(CHECKPOINTS / registry.lineage.id)
    folder.prepare()
    registry.begin_attempt(run_tags(registry.lineage, processes))
    registry.about = about_checkpoints(params, registry.lineage)

    def describe() -> None:
        registry.describe(run_page(params, registry.lineage, registry.about, registry.entries()))

    describe()
    store = S3Store(registry.checkpoints_address)
    latest = registry.latest()
    newest = latest.step if latest else 0
    of_this_attempt = TrainingStatus(registry.lineage.id, registry.page, registry.attempt, started, params.train.total_steps, registered=newest)
    status = StatusFile(STATUS, of_this_attempt)

    def retain(manifest: Manifest) -> None:
        status.registered(manifest.step)
        lease.validate()
        # A validation that a stop cut short was made up for after its step was registered.
        registry.score(keeper.history.scores())
        # What a finished training leaves is copied from the newest step that is saved, which need not be the newest of all.
        prune(folder, store, registry, params.checkpoints, in_use={manifest.step, keeper.saver.safe_step})
        describe()

    publisher = Publisher(folder, store, registry, fence=lease, registered=retain, beside=predictor_files(params))
    keeper = Keeper(lease, folder, store, registry, publisher, Saver(folder, publisher, params.checkpoints.most_failed_saves), status)
    publisher.start()
    try:
        yield keeper
    except BaseException:
        try:
            keeper.saver.wait()
        finally:
            conclude(keeper, "FAILED", lambda: True)
        raise


def catch_up(keeper: Keeper) -> None:
    """Publish what an earlier attempt committed but could not register, and send the metrics so far."""
    registered = keeper.registry.registered()
    for step in sorted(set(keeper.folder.steps()) - registered.keys()):
        problems = keeper.folder.problems(step, keeper.registry.lineage.id)
        if problems:
            log.warning("checkpoint %d is not registered and can't be any more: %s", step, "; ".join(problems))
        else:
            keeper.publisher.publish(keeper.folder.manifest(step))
    for row in keeper.history.rows:
        keeper.publisher.send(row)


def validated(evaluation: Evaluation) -> Validation:
    """PSNR and SSIM on the validation clips, and a picture of one of them."""
    scores = evaluation.metrics()
    return Validation({key: scores[key] for key in ("psnr", "ssim", "input_psnr")}, png(preview(*evaluation.preview_frames)))


def conclude(keeper: Keeper, status: str, hurry: Callable[[], bool]) -> int:
    """Wait for everything to be registered, then set the run's status.

    Where something is missing it logs the reasons and returns EXIT_UNAVAILABLE, if it is only that services did not answer, or EXIT_FAILED.
    """
    missing = keeper.publisher.finish(SECONDS_TO_PUBLISH, hurry)
    for reason in missing:
        log.error("not registered: %s", reason)
    if missing:
        log.error("what is committed is safe in %s; run the same command again to register what can be", keeper.folder.path)
    if keeper.lease.lost:
        # The run is its successor's now.
        return EXIT_FAILED
    try:
        told = "FAILED" if missing and status == "FINISHED" else status

        def close() -> None:
            keeper.registry.score(keeper.history.scores())
            keeper.registry.close(told)

        if not within(SECONDS_TO_PUBLISH, close, hurry, SECONDS_TO_CLOSE):
            log.error("the run's status could not be set: MLflow gave no answer in time")
            return EXIT_UNAVAILABLE
    except Exception as error:
        # Whatever MLflow says to it, the checkpoints are registered or listed above.
        log.error("the run's status could not be set: %s", error)
        return EXIT_UNAVAILABLE if isinstance(error, StoreUnavailable) else EXIT_FAILED
    if not missing:
        return EXIT_DONE
    return EXIT_UNAVAILABLE if keeper.publisher.may_arrive_later else EXIT_FAILED


def facts(lineage: Lineage, registry: Curator) -> dict:
    """What every manifest of this attempt says besides its files and metrics."""
    return {"lineage": lineage.id, "identity": lineage.identity, "origin": origin_here(lineage, str(registry.attempt))}


def run_tags(lineage: Lineage, processes: int) -> dict[str, str]:
    """What the MLflow run says of the newest attempt."""
    parent = {"vrt.parent": lineage.identity["fork"]} if "fork" in lineage.identity else {}
    return parent | {
        "vrt.code_version": code_version(),
        "vrt.host": platform.node(),
        "vrt.torch": torch.__version__,
        "vrt.threads": str(torch.get_num_threads()),
        "vrt.processes": str(processes),
    }
