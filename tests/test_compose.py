"""compose.yaml: what the Compose specification allows, and what its services need of each other."""

import re
import shlex
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


def test_every_value_to_fill_in_is_used_and_every_one_used_can_be_filled_in():
    offered = set(re.findall(r"^(\w+)=", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", COMPOSE.read_text())) == offered


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
    mounted = {entry.split(":")[0] for service in services.values() for entry in service.get("volumes", []) if not entry.startswith(".")}
    assert mounted == volumes


def test_nothing_is_reached_from_other_machines_unless_told(services):
    for service in services.values():
        assert all(entry.startswith("127.0.0.1:") for entry in service.get("ports", []))


def test_the_worker_has_time_to_save(services):
    seconds = int(services["worker"]["stop_grace_period"].removesuffix("s"))
    assert seconds > 2 * SECONDS_TO_SAVE
