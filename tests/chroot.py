"""Builds an image from a Dockerfile and runs it, by chroot and namespaces: for machines that have root but no container engine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """A root folder, and what a Dockerfile says of the processes in it."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": SAFE_PATH})
    folder: str = "/"
    user: str = "0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM

    def start(self, *command: str, **options) -> subprocess.Popen:
        """Run `command`, or the image's own, as process 1 of a container that has no network but its own loopback."""
        words = (*self.entrypoint, *(command or self.command))
        return subprocess.Popen(_inside(self, words, self.environment, {}, ("--net", "--ipc", "--uts")), **options)


@dataclass(frozen=True)
class Outside:
    """What a build needs of the machine it runs on: variables, and the files and folders that they name, each with its place in the image."""

    variables: Mapping[str, str]
    mounts: Mapping[str, str]


def _inside(image: Image, words: Sequence[str], environment: Mapping[str, str], mounts: Mapping[str, str], namespaces: Sequence[str]) -> list[str]:
    """A command that runs `words` in an image, in namespaces of its own: what it mounts and starts goes with it."""
    root = shlex.quote(str(image.root))
    script = ["set -e", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    for source, target in mounts.items():
        make = "mkdir -p" if Path(source).is_dir() else f"mkdir -p $(dirname {root}{target}) && touch"
        script += [f"{make} {root}{target}", f"mount --bind {shlex.quote(source)} {root}{target}"]
    if "--net" in namespaces:
        script.append("ip link set lo up")
    user = f"--userspec={image.user}:{image.user}"
    variables = [f"{name}={value}" for name, value in environment.items()]
    chroot = ["exec", "chroot", user, str(image.root), "/usr/bin/env", "-i", *variables, "/bin/sh", "-c", f'cd {image.folder} && exec "$@"', "sh"]
    script.append(shlex.join([*chroot, *words]))
    return ["unshare", "--mount", "--pid", "--fork", "--kill-child", *namespaces, "/bin/sh", "-c", "\n".join(script)]


def build(dockerfile: Path, bases: Mapping[str, Path], folder: Path, arguments: Mapping[str, str], outside: Outside) -> Image:
    """Run every instruction of a Dockerfile, whose context is the folder it lies in, and return the image of its last stage.

    bases: root folders of the images that it names. An instruction or flag that is not understood raises ValueError.
    """
    context = folder / "context"
    copy_context(dockerfile.parent, context)
    stages: dict[str, Image] = {}
    image, values = Image(folder), {}
    for step in DockerfileParser(str(dockerfile)).structure:
        kind, value = step["instruction"], step["value"]
        match kind:
            case "COMMENT" | "LABEL":
                pass
            case "FROM":
                source, _, name = value.partition(" AS ")
                name, values = name or "final", {}
                image = _from(source, stages, bases, folder / name)
            case "ARG":
                name, _, default = value.partition("=")
                values[name] = arguments.get(name, default)
            case "ENV":
                pairs = dict(pair.split("=", 1) for pair in shlex.split(value))
                known = {**image.environment, **values}
                image = replace(image, environment={**image.environment, **{name: _expand(text, known) for name, text in pairs.items()}})
            case "WORKDIR":
                (image.root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
                image = replace(image, folder=value)
            case "COPY":
                _copy(value, image, context, stages)
            case "RUN":
                variables = {**image.environment, **values, **outside.variables}
                subprocess.run(_inside(image, ("/bin/sh", "-c", value), variables, outside.mounts, ()), check=True)
            case "USER":
                image = replace(image, user=value)
            case "ENTRYPOINT" | "CMD":
                image = replace(image, **{"entrypoint" if kind == "ENTRYPOINT" else "command": _words(value)})
            case "HEALTHCHECK":
                image = replace(image, health=_words(value.partition("CMD ")[2]))
            case "STOPSIGNAL":
                image = replace(image, stop_signal=signal.Signals[value])
            case _:
                raise ValueError(f"{dockerfile} line {step['startline'] + 1}: {kind} is not understood here")
        stages[image.root.name] = image
    return image


def _from(source: str, stages: Mapping[str, Image], bases: Mapping[str, Path], root: Path) -> Image:
    """A stage that begins as a copy of another, or of a base."""
    begun = stages.get(source) or Image(bases[source])
    subprocess.run(["cp", "--archive", "--reflink=auto", f"{begun.root}/.", str(root)], check=True)
    return replace(begun, root=root)


def _expand(text: str, known: Mapping[str, str]) -> str:
    """As Docker does: $NAME, ${NAME} and ${NAME:-what is taken where it is empty}."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})", lambda found: known.get(found[1] or found[2], "") or found[3] or "", text)


def _words(value: str) -> tuple[str, ...]:
    """The exec form. The shell form would put a shell before the process that is to hear of signals."""
    return tuple(json.loads(value))


def copy_context(source: Path, context: Path) -> None:
    """What .dockerignore leaves of a folder."""
    ignored = [line for line in (source / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for name in exclude_paths(str(source), ignored):
        path = context / name
        if (source / name).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, path)


def _copy(value: str, image: Image, context: Path, stages: Mapping[str, Image]) -> None:
    words = shlex.split(value)
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    *sources, target = (word for word in words if not word.startswith("--"))
    start = stages[options["from"]].root if "from" in options else context
    place = image.root / os.path.normpath(os.path.join(image.folder, target)).lstrip("/")
    for name in sources:
        source = start / name.lstrip("/")
        copied = image.root.parent / "copied"
        subprocess.run(["cp", "--archive", "--reflink=auto", str(source), str(copied)], check=True)
        subprocess.run(["chown", "--recursive", options.get("chown", "0:0"), str(copied)], check=True)
        into = place / source.name if source.is_file() and target.endswith("/") else place
        into.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", f"{copied}/." if copied.is_dir() else str(copied), str(into)], check=True)
        shutil.rmtree(copied) if copied.is_dir() else copied.unlink()


def pip_here() -> Outside:
    """How pip reaches packages on this machine: its settings as variables, and the files and folders that they name."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, stdout=subprocess.PIPE, text=True).stdout
    variables = {}
    for scope, name, value in re.findall(r"^(\S*?)\.([\w-]+)='(.*)'$", listed, flags=re.MULTILINE):
        if scope in ("global", "install", ":env:"):
            variables[f"PIP_{name.upper().replace('-', '_')}"] = value
    variables |= {name: value for name, value in os.environ.items() if name.lower() in ("http_proxy", "https_proxy", "no_proxy", "ssl_cert_file")}
    words = {(name, word.removeprefix("file://")) for name, value in variables.items() for word in value.split()}
    # An index lists files that lie beside it.
    paths = {os.path.dirname(word) if name.endswith("INDEX_URL") else word for name, word in words if word.startswith("/") and Path(word).exists()}
    # Not at their own places, where packages that the image installs may want to write.
    mounts = {path: f"/mnt/outside{path}" for path in sorted(paths)}
    for path, place in mounts.items():
        variables = {name: re.sub(rf"(?:(?<![\w/])|(?<=file://)){path}(?![\w-])", place, value) for name, value in variables.items()}
    return Outside(variables, mounts | {"/etc/resolv.conf": "/etc/resolv.conf"})
