"""`vrt` commands in forked children, so that hundreds of them pay for importing torch and MLflow once.

Run as a program, this is the server. It reads one order a line from stdin, a JSON object {"arguments", "folder", "environment", "log", "code"},
and answers with the process id of the child that runs it. Once that ended, the file `code` has its return code, as `subprocess` gives it.
It is a process of its own since a fork is only safe before any thread is started.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS_A_COMMAND_MAY_TAKE = 600


@dataclass(frozen=True)
class Forked:
    """A running command."""

    pid: int
    log: Path
    code: Path

    @property
    def ended(self) -> bool:
        return self.code.exists()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Until it ends; returns its code, negative for a signal."""
        late = threading.Timer(SECONDS_A_COMMAND_MAY_TAKE, self.kill)
        late.start()
        while not self.ended:
            time.sleep(0.02)
        late.cancel()
        return int(self.code.read_text())


class ForkServer:
    """Starts commands, each a forked child with the imports done. Use it as a context manager."""

    def __enter__(self) -> "ForkServer":
        self._folder = tempfile.TemporaryDirectory(prefix="vrt-forked-")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen([sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._started: list[Forked] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._end_what_is_left()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def train(self, workspace, kill_at: str = "", variables: Mapping[str, str] = {}) -> Forked:  # noqa: B006
        """Start `vrt train` in the workspace, its output in the workspace's log; `kill_at` as VRT_KILL_AT takes it."""
        # A test that failed left them behind.
        self._end_what_is_left()
        return self._start(["train"], workspace.root, {**workspace.environment, **variables, "VRT_KILL_AT": kill_at}, workspace.log)

    def run(self, arguments: list[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess:
        """`vrt ARGUMENTS` to its end; `stdout` holds all it printed."""
        log = Path(self._folder.name) / f"{len(self._started)}.log"
        code = self._start(arguments, folder, environment, log).wait()
        return subprocess.CompletedProcess(["vrt", *arguments], code, log.read_text())

    def _start(self, arguments: list[str], folder: Path, environment: Mapping[str, str], log: Path) -> Forked:
        code = Path(self._folder.name) / str(len(self._started))
        log.write_text("")
        order = {"arguments": arguments, "folder": str(folder), "environment": dict(environment), "log": str(log), "code": str(code)}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        self._started.append(Forked(int(self._process.stdout.readline()), log, code))
        return self._started[-1]

    def _end_what_is_left(self) -> None:
        for forked in self._started:
            if not forked.ended:
                forked.kill()
                forked.wait()


def serve() -> None:
    """Be the server, until stdin ends."""
    # Here and not above: processes that a command spawns import this file too. The private one is what the first optimizer imports.
    import boto3
    import matplotlib.backends.backend_agg  # noqa: F401
    import mlflow.tracking.client
    import torch._dynamo  # noqa: F401

    import vrt.stages.train  # noqa: F401

    # What these load lazily is loaded here.
    mlflow.tracking.client.MlflowClient("http://127.0.0.1:9")
    boto3.client("s3", region_name="us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
    boto3.DEFAULT_SESSION = None
    # Else each child looks through, and so copies, all of it.
    gc.collect()
    gc.freeze()
    # Nobody here waits for those that wait for the commands.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        assert threading.active_count() == 1
        if not os.fork():
            try:
                wait_for(json.loads(line))
            finally:
                os._exit(0)


def wait_for(order: dict) -> None:
    """Run a command in a child, answer with its process id, and leave its return code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        try:
            run(order)
        finally:
            os._exit(70)
    print(pid, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    part = Path(f"{order['code']}.part")
    part.write_text(str(code))
    part.rename(order["code"])


def run(order: dict) -> None:
    """Be the process that runs one command."""
    from vrt.cli import program

    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    for descriptor, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(file, descriptor)
    sys.argv[1:] = order["arguments"]
    try:
        program()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
