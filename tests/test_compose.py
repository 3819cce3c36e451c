"""compose.yaml: what the Compose specification allows, and what its services need of each other."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compose_spec import PyCompose, PyOptions
from ruamel.yaml import YAML

from vrt.lifecycle import SECONDS_TO_SAVE

PROJECT = Path(__file__).parents[1]
COMPOSE, EXAMPLE = PROJECT / "compose.yaml", PROJECT / ".env.example"
SECRETS = {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
DEFINITION = r"\$\{(\w+)(?::?-([^}]*)|:\?([^}]*))?\}"


def docker_compose(folder: Path, values: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    """Run `docker compose` on the project, with `values` as its .env."""
    filled_in = folder / "values"
    filled_in.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "DOCKER_CONFIG")}
    command = ["docker", "compose", "--project-directory", str(PROJECT), "--env-file", str(filled_in), *words]
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)


HAS_COMPOSE = shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
needs_compose = pytest.mark.skipif(not HAS_COMPOSE, reason="not on this machine: `docker compose`, which needs no engine for this")


def with_values(text: str, values: dict[str, str]) -> str:
    """compose.yaml as `docker compose` reads it: each ${NAME} replaced by its value, or by what stands there for one that is empty."""
    return re.sub(DEFINITION, lambda found: values.get(found[1]) or found[2] or "", text)


def read(values: dict[str, str]) -> dict[str, Any]:
    return YAML(typ="safe").load(with_values(COMPOSE.read_text(), values))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return read(dict.fromkeys(SECRETS, "placeholder"))["services"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_what_the_specification_allows(name: str):
    options = PyOptions()
    options.apply_merge = True
    options.from_yaml(with_values((PROJECT / name).read_text(), dict.fromkeys(SECRETS, "placeholder"))).validate()


def test_the_specification_is_really_asked():
    with pytest.raises(ValueError, match="imagee"):
        PyCompose.from_yaml("services: {a: {imagee: x}}")


@needs_compose
@pytest.mark.parametrize("others", [[], ["compose.gpu.yaml"]])
def test_docker_compose_itself_takes_it(others: list[str], tmp_path: Path):
    files = [part for name in ("compose.yaml", *others) for part in ("--file", name)]
    ended = docker_compose(tmp_path, dict.fromkeys(SECRETS, "placeholder"), *files, "config", "--quiet")
    assert (ended.returncode, ended.stderr) == (0, "")


@needs_compose
@pytest.mark.parametrize("secret", sorted(SECRETS))
def test_without_a_secret_docker_compose_starts_nothing_and_says_what_to_do(secret: str, tmp_path: Path):
    ended = docker_compose(tmp_path, dict.fromkeys(SECRETS - {secret}, "placeholder") | {secret: ""}, "config", "--quiet")
    assert ended.returncode != 0
    assert f"{secret} is missing a value: copy .env.example to .env and fill it in" in ended.stderr


def test_every_value_to_fill_in_is_used_and_every_one_used_can_be_filled_in():
    offered = set(re.findall(r"^(\w+)=", EXAMPLE.read_text(), flags=re.MULTILINE))
    # The commit comes from the command that builds.
    assert set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) == offered | {"REVISION"}


def test_no_secret_has_a_default_and_each_that_is_missing_is_asked_for():
    text, example = COMPOSE.read_text(), EXAMPLE.read_text()
    for secret in SECRETS:
        assert re.search(rf"^{secret}=$", example, flags=re.MULTILINE)
        assert f"${{{secret}:?copy .env.example to .env and fill it in}}" in text
        assert not re.search(rf"\$\{{{secret}:?-", text)


def test_no_secret_is_on_a_command_line(services):
    for service in services.values():
        assert "placeholder" not in shlex.join(map(str, service.get("command", [])))


def test_who_needs_another_waits_until_that_one_works(services):
    named = set(services)
    for name, service in services.items():
        if name != "worker":
            assert service["healthcheck"]["test"][0] == "CMD", name
        spoken_to = {other for other in named - {name} if re.search(rf"//([^@/]*@)?{other}:", str(service.get("environment", "")))}
        # Prefect, MLflow and the worker's store come up with those they wait for.
        waited_for = set(service.get("depends_on", {}))
        assert spoken_to <= waited_for | {other for first in waited_for for other in services[first].get("depends_on", {})}, name
        assert all(how == {"condition": "service_healthy"} for how in service.get("depends_on", {}).values()), name


def test_all_that_must_outlive_a_container_is_in_a_volume(services):
    volumes = set(read({})["volumes"])
    mounted = {name: [entry for entry in service.get("volumes", []) if not entry.startswith(".")] for name, service in services.items()}
    assert {entry.split(":")[0] for entries in mounted.values() for entry in entries} == volumes
    places = {name: {entry.split(":")[1] for entry in entries} for name, entries in mounted.items() if entries}
    kept = {"data", "checkpoints", ".vrt", ".dvc/cache"}
    assert places == {"postgres": {"/var/lib/postgresql/data"}, "s3": {"/srv/s3"}, "worker": {f"/srv/vrt/{folder}" for folder in kept}}


def test_nothing_is_reached_from_other_machines_unless_told(services):
    for service in services.values():
        assert all(entry.startswith("127.0.0.1:") for entry in service.get("ports", []))


def test_the_worker_has_time_to_save(services):
    seconds = int(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert seconds > 2 * SECONDS_TO_SAVE
