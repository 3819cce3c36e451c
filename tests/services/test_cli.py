"""`vrt services` as a person and a shell use it."""

import argparse
import json
import subprocess

import pytest

from vrt import services
from vrt.services import cli


@pytest.fixture
def vrt(s3_home, monkeypatch, tmp_path):
    """Runs `vrt services ...` for a home with S3 only, from an empty folder."""
    monkeypatch.setenv("VRT_HOME", str(s3_home))
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())

    def run(*arguments: str) -> int:
        args = parser.parse_args(["services", *arguments])
        return args.run(args)

    return run


@pytest.fixture
def all_given_alive(monkeypatch):
    """Addresses that are taken on trust, so that only S3 decides whether all is up."""
    monkeypatch.setenv("PREFECT_API_URL", "given:prefect")


def test_status_is_1_until_all_is_up(vrt, all_given_alive, capsys):
    assert vrt("status") == 1
    assert vrt("up") == 0
    assert vrt("status") == 0
    assert vrt("down") == 0
    assert vrt("status") == 1


def test_status_is_1_where_a_given_service_does_not_answer(vrt, capsys):
    assert vrt("up") == 1
    assert "not answering, given by the environment" in capsys.readouterr().out


def test_only_given_services_can_be_looked_at(vrt, all_given_alive, capsys, monkeypatch):
    # The local S3 server is down, which is nobody's business in a container.
    assert vrt("status", "--given") == 0
    assert "Prefect" in (out := capsys.readouterr().out) and "S3" not in out
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert vrt("status", "--given") == 1


def test_the_table_says_what_is_up_where(vrt, all_given_alive, s3_home, capsys):
    vrt("up")
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "S3" in line)
    state = services.status(s3_home)[0]
    assert all(text in row for text in (state.address, " up ", str(state.pid), str(s3_home / "services" / "s3")))
    assert "sqlite:///given.db" in out and "up, given by the environment" in out


def test_json_is_for_programs_and_has_no_secret(vrt, all_given_alive, s3_home, capsys):
    vrt("up")
    secret = services.load_environment(s3_home)["AWS_SECRET_ACCESS_KEY"]
    capsys.readouterr()
    vrt("status", "--json")
    out = capsys.readouterr().out
    assert [(one["name"], one["state"], one["given"]) for one in json.loads(out)] == [
        ("s3", "up", False),
        ("mlflow", "up", True),
        ("prefect", "up", True),
    ]
    assert secret not in out


def test_the_exports_mean_the_same_to_a_shell(vrt, s3_home, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intra net;$HOME'")
    assert vrt("env") == 0
    exports = capsys.readouterr().out
    expected = services.load_environment(s3_home)
    shown = subprocess.run(["sh", "-c", f"{exports}\nenv"], env={}, capture_output=True, text=True, check=False).stdout
    assert expected.items() <= dict(line.split("=", 1) for line in shown.splitlines()).items()


def test_a_terminal_is_not_shown_the_secret(vrt, s3_home, capsys, monkeypatch):
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: True)
    vrt("env")
    out = capsys.readouterr().out
    assert services.load_environment(s3_home)["AWS_SECRET_ACCESS_KEY"] not in out
    assert "# AWS_SECRET_ACCESS_KEY is not shown on a terminal" in out


def test_down_says_what_it_stopped(vrt, caplog):
    caplog.set_level("INFO", logger="vrt")
    vrt("down")
    assert "nothing was running" in caplog.text
    vrt("up")
    vrt("down")
    assert "stopped S3" in caplog.text
