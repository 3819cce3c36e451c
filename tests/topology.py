"""The servers and the worker of compose.yaml, word for word, but as processes: in a namespace where all its host names are this machine."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import psutil

PATIENCE_SECONDS = 120
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), Path("/none")).parent
MISSING = [
    what
    for what, found in {
        "root": os.geteuid() == 0,
        "PostgreSQL (`apt install postgresql`)": POSTGRES.exists(),
        "unshare": shutil.which("unshare"),
        "ip": shutil.which("ip"),
    }.items()
    if not found
]


class Topology:
    """Services of compose.yaml (with its values filled in), each a process group; `folder` has their logs and data."""

    def __init__(self, services: Mapping[str, Mapping[str, Any]], project: Path, folder: Path):
        self.services, self.project, self.folder = services, project, folder
        self.running: dict[str, subprocess.Popen] = {}
        hosts = folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(services)}\n")
        (folder / "databases").mkdir()
        shutil.chown(folder / "databases", "postgres", "postgres")
        script = "\n".join(
            [
                "set -e",
                f"mount --bind {hosts} /etc/hosts",
                # The places of the volumes.
                "mount -t tmpfs none /srv",
                "ip link set lo up",
                "exec sleep infinity",
            ]
        )
        self._holder = subprocess.Popen(["unshare", "--mount", "--net", "/bin/sh", "-c", script])
        self._wait("the namespace", lambda: psutil.Process(self._holder.pid).cmdline()[:1] == ["sleep"])

    def command(self, *words: str) -> list[str]:
        """`words`, to be run among the services."""
        return ["nsenter", "--target", str(self._holder.pid), "--mount", "--net", f"--wd={self.project}", *words]

    def environment(self, service: str) -> dict[str, str]:
        """That of a process of the service: the image's programs, and what compose.yaml sets; nothing of whoever runs the tests."""
        image = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(self.folder), "PYTHONPATH": str(self.project)}
        return image | {name: str(value) for name, value in self.services[service].get("environment", {}).items()}

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text()

    def up(self, *names: str) -> None:
        """Start services, in this order, each once those before it are healthy."""
        for name in names:
            words = self._postgres() if name == "postgres" else self.services[name].get("command", ["python", "-m", "pipelines"])
            with (self.folder / f"{name}.log").open("a") as log:
                self.running[name] = subprocess.Popen(
                    self.command(*words), env=self.environment(name), stdout=log, stderr=subprocess.STDOUT, process_group=0
                )
            self._wait(name, lambda name=name: self.healthy(name))

    def healthy(self, name: str) -> bool:
        assert self.running[name].poll() is None, f"{name} ended with {self.running[name].returncode}:\n{self.log(name)}"
        check = self.services[name].get("healthcheck")
        if check is None:
            return "works for them until Ctrl-C" in self.log(name)
        words = [str(POSTGRES / "pg_isready"), *check["test"][2:]] if name == "postgres" else check["test"][1:]
        return subprocess.run(self.command(*words), env=self.environment(name), capture_output=True, check=False).returncode == 0

    def kill(self, name: str) -> None:
        """At once, with everything it started."""
        process = self.running.pop(name)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            if child.is_running():
                child.kill()
        process.wait()

    def stop(self, name: str) -> int:
        """As `docker stop` does: SIGTERM to the main process."""
        process = self.running.pop(name)
        process.terminate()
        return process.wait(PATIENCE_SECONDS)

    def ask(self, *words: str, service: str = "worker", check: bool = True) -> str:
        """The output of a command, run with the environment of a service."""
        ended = subprocess.run(
            self.command(*words), env=self.environment(service), check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert not check or ended.returncode == 0, f"{words}: {ended.stdout}"
        return ended.stdout

    def docker(self, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """What `docker compose ...` does: done here, or a command and its environment that do it where it was called."""
        assert words[0] == "compose", words
        match words[1:]:
            case "stop", *names:
                for name in set(names) & set(self.running):
                    self.stop(name)
            case "up", "--detach", "--wait":
                self.up(*(name for name in self.services if name not in self.running))
            case "exec", "-T", "postgres", *command:
                return self.command("env", "PGHOST=/tmp", *command), self.environment("postgres")
            case "run", *words if "s3" in words:
                options, command = words[: words.index("s3")], words[words.index("s3") + 1 :]
                folder, place = options[options.index("--volume") + 1].split(":")
                # Newer ones tell on stderr what they do.
                told = ("sh", "-c", 'echo "Container s3 Created" >&2; exec "$@"', "sh")
                return self.command(*told, *(word.replace(place, folder, 1) for word in command)), self.environment("s3")
            case _:
                raise ValueError(f"not known here: docker {' '.join(words)}")
        return ["true"], {}

    def run_script(self, *command: str) -> subprocess.CompletedProcess:
        """Run a script for compose.yaml in the project; its `docker` is this topology."""
        (self.folder / "bin").mkdir(exist_ok=True)
        shim, socket = self.folder / "bin" / "docker", self.folder / "docker.socket"
        code = [
            f"#!{sys.executable}",
            "import os, sys",
            "from multiprocessing.connection import Client",
            f"with Client({str(socket)!r}) as asked:",
            "    asked.send(sys.argv[1:])",
            "    command, environment = asked.recv()",
            "os.execvpe(command[0], command, {'PATH': os.environ['PATH']} | environment)",
        ]
        shim.write_text("\n".join(code) + "\n")
        shim.chmod(0o755)
        with Listener(str(socket)) as listener:
            path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            script = subprocess.Popen(command, cwd=self.project, env={**os.environ, "PATH": path}, **pipes)
            serving = threading.Thread(target=self._answer, args=(listener,), daemon=True)
            serving.start()
            output, _ = script.communicate(timeout=5 * PATIENCE_SECONDS)
        return subprocess.CompletedProcess(command, script.returncode, output)

    def _answer(self, listener: Listener) -> None:
        while True:
            try:
                asked = listener.accept()
            except OSError:
                return
            with asked:
                asked.send(self.docker(asked.recv()))

    def down(self) -> None:
        for name in list(self.running):
            self.kill(name)
        self._holder.kill()
        self._holder.wait()

    def _postgres(self) -> Sequence[str]:
        """What the entry point of PostgreSQL's image does: a new cluster at first, with the databases of the mounted script; then the server."""
        data = self.folder / "databases" / "cluster"
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
        if not data.exists():
            password = self.folder / "databases" / "password"
            password.write_text(str(self.services["postgres"]["environment"]["POSTGRES_PASSWORD"]))
            shutil.chown(password, "postgres")
            create = [*user, str(POSTGRES / "initdb"), "--username=postgres", f"--pwfile={password}", "--auth-host=scram-sha-256", str(data)]
            subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
            script = next(entry.split(":")[0] for entry in self.services["postgres"]["volumes"] if "initdb.d" in entry)
            for statement in (line for line in (self.project / script).read_text().splitlines() if not line.startswith("--")):
                subprocess.run([*user, str(POSTGRES / "postgres"), "--single", "-D", str(data), "postgres"], input=statement, text=True, check=True)
        # Its user can not enter the project.
        return ["env", "--chdir=/", *user, str(POSTGRES / "postgres"), "-D", str(data), "-k", "/tmp", "-c", "listen_addresses=*"]

    def _wait(self, what: str, ready) -> None:
        ends = time.monotonic() + PATIENCE_SECONDS
        while not ready():
            assert time.monotonic() < ends, f"{what} does not answer: {self.log(what) if what in self.running else ''}"
            time.sleep(0.3)
