"""`python -m pipelines`: work for the deployments of prefect.yaml, so that `prefect deployment run train/vrt` works while this runs."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

from pipelines.process import PROJECT
from vrt import services
from vrt.lifecycle import SECONDS_TO_SAVE, write_nowhere

POOL = "vrt"
PR_SET_PDEATHSIG = 1


def main() -> int:
    """Deploy everything in prefect.yaml and work for it, until told to end. Returns the worker's exit code, 0 where it was told."""
    os.environ.update(services.load_environment())
    os.chdir(PROJECT)
    _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    _prefect("--no-prompt", "deploy", "--all")
    print("deployed train/vrt, evaluate/vrt, promote/vrt and restore/vrt (prefect.yaml); this works for them until Ctrl-C", flush=True)
    # In a group of its own, because Ctrl-C on a terminal reaches all of a group. Before any thread is started, which preexec_fn does not go with.
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    worker = subprocess.Popen(command, process_group=0, preexec_fn=_end_with_parent)  # noqa: PLW1509
    received: list[int] = []
    # Under nohup, outliving the terminal is what the user asked for.
    hangup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else set()
    for number in {signal.SIGTERM, signal.SIGINT} | hangup:
        signal.signal(number, lambda number, _frame: received.append(number))
    try:
        # Prefect reads its address when it is imported.
        from pipelines import heartbeat

        heartbeat.ensure()
    except BaseException:
        worker.kill()
        raise
    while worker.poll() is None and not received:
        time.sleep(0.2)
    if signal.SIGHUP in received:
        # Its terminal is gone.
        write_nowhere((1, 2))
    if received:
        print(f"received {signal.Signals(received[0]).name}: every run saves what it has, and ends", flush=True)
        end_runs(worker)
    return worker.wait() if not received else 0


def _end_with_parent() -> None:
    """In the worker before it is one: nobody would see that it still takes runs, should this process be killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_runs(worker: subprocess.Popen) -> None:
    """End the runs that the worker has, then the worker: by itself it would wait for them, and trainings take days."""
    try:
        runs = psutil.Process(worker.pid).children()
    except psutil.NoSuchProcess:
        return
    for run in runs:
        if run.is_running():
            run.terminate()
    # Not before they have ended: they speak through it, and it tells Prefect of them.
    psutil.wait_procs(runs, timeout=2 * SECONDS_TO_SAVE)
    # It keeps nothing, and was seen to stay for ever once it was told to end.
    worker.kill()


def _prefect(*arguments: str) -> None:
    """Run a command of Prefect's; it is heard only where it fails, since it explains at length."""
    ended = subprocess.run([sys.executable, "-m", "prefect", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode:
        print(ended.stdout)
        raise SystemExit(
            f"`prefect {' '.join(arguments)}` failed (exit code {ended.returncode}); `vrt services status` shows whether Prefect answers"
        )


if __name__ == "__main__":
    sys.exit(main())
