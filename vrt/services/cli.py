"""`vrt services up | status | down | env`."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict

from vrt.observe import log
from vrt.services import local
from vrt.services.local import ServiceState
from vrt.services.servers import TITLES

_DESCRIPTION = """MLflow, Prefect and an S3 server on this machine, reachable from this machine only (by all of its users). Their data is in
.vrt/services of the project, or in $VRT_HOME. A service that MLFLOW_TRACKING_URI, PREFECT_API_URL or AWS_ENDPOINT_URL names is used as it is;
nothing is started for it."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY",)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `vrt services`."""
    parser = subparsers.add_parser("services", help="start, show and stop the local MLflow, Prefect and S3 servers", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("up", help="start what is not running; does nothing where all is up")
    status = actions.add_parser("status", help="say what is up where; exit code 1 unless all is up")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--given", action="store_true", help="look only at those that the environment names, as a container's health check does")
    actions.add_parser("down", help="stop what runs here; data stays")
    actions.add_parser("env", help='print variables for a shell: eval "$(vrt services env)"')


def run(args: argparse.Namespace) -> int:
    """Do what `vrt services` was told. Returns an exit code."""
    match args.action:
        case "up":
            return _show(local.up())
        case "status":
            return _show([service for service in local.status() if service.given or not args.given], as_json=args.json)
        case "down":
            return _down()
        case _:
            return _print_environment()


def _show(states: Sequence[ServiceState], as_json: bool = False) -> int:
    if as_json:
        print(json.dumps([asdict(service) for service in states], default=str, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("service", "address", "state", "pid", "data")
        for service in states:
            table.add_row(TITLES[service.name], service.address or "-", _in_words(service), str(service.pid or "-"), str(service.data or "-"))
        # A file or a pipe gets whole lines: a path broken in two can't be copied.
        Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0 if all(service.state == "up" for service in states) else 1


def _in_words(service: ServiceState) -> str:
    return f"{service.state}, given by the environment" if service.given else service.state


def _down() -> int:
    ended = local.down()
    log.info("stopped %s" if ended else "nothing was running%s", ", ".join(TITLES[name] for name in ended))
    return 0


def _print_environment() -> int:
    for variable, value in local.load_environment().items():
        if variable in _SECRETS and sys.stdout.isatty():
            print(f'# {variable} is not shown on a terminal; eval "$(vrt services env)" sets it')
        else:
            print(f"export {variable}={shlex.quote(value)}")
    return 0
