"""`vrt checkpoints list | verify | repair | show | fetch | prune | pin | unpin | settle | adopt`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vrt.observe import log

_DESCRIPTION = """The checkpoints of one training: in the local folder, in the store, and in the registry. Of the training of params.yaml in the
current folder, or of another one (--lineage). Exit code 0: all is well; 1: problems were found; 2: the input is wrong."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `vrt checkpoints`."""
    parser = subparsers.add_parser("checkpoints", help="list, verify, repair, fetch and prune checkpoints", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    common.add_argument("--json", action="store_true", help="for programs")
    one = argparse.ArgumentParser(add_help=False, parents=[common])
    one.add_argument("--lineage", metavar="NAME-FINGERPRINT", help="another training than that of the params file")

    def action(name: str, act: Callable[..., int], told: str, parent: argparse.ArgumentParser = one) -> argparse.ArgumentParser:
        command = actions.add_parser(name, help=told, description=told, parents=[parent])
        command.set_defaults(act=act)
        return command

    action("list", _list, "every checkpoint and where it is")
    verifying = action("verify", _verify, "read every byte on both sides: healthy, missing, damaged, unregistered")
    repairing = action("repair", _repair, "restore what is damaged or missing on one side from the other; register what is not registered")
    for command in (verifying, repairing):
        command.add_argument("steps", metavar="STEP", type=int, nargs="*", help="default: all")
    repairing.add_argument("--dry-run", action="store_true", help="only say what would be done")
    action("show", _show, "everything about one checkpoint").add_argument("step", metavar="STEP", type=int)
    fetching = action("fetch", _fetch, "bring a checkpoint from the store into the local folder")
    fetching.add_argument("step", metavar="STEP", type=int, nargs="?", help="default: the newest that is registered")
    fetching.add_argument("--to", type=Path, metavar="FOLDER", help="into another folder")
    pruning = action("prune", _prune, "delete what checkpoints.keep_* of the params file doesn't keep, or what you name, on every side")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    named = pruning.add_mutually_exclusive_group()
    named.add_argument("--step", type=int, metavar="STEP", help="delete this one instead, such as one that is beyond repair")
    named.add_argument("--after", type=int, metavar="STEP", help="delete all newer than this instead, to go back to it")
    action("pin", _pin, "keep a registered checkpoint for ever").add_argument("step", metavar="STEP", type=int)
    action("unpin", _unpin, "treat it as any other again").add_argument("step", metavar="STEP", type=int)
    action("settle", _settle, "mark the run in MLflow as killed, if its trainer was")
    adopting = action("adopt", _adopt, "make a checkpoint of files that KAIR wrote; `vrt train` goes on from it", common)
    adopting.add_argument("folder", type=Path, metavar="FOLDER", help="folder with 2000_G.pth, 2000_optimizerG.pth, and 2000_E.pth if there are any")


def run(args: argparse.Namespace) -> int:
    """Execute a command that `add_parser` parsed. Raises ValueError or RuntimeError, whose messages are for the user."""
    from vrt.checkpoint.lock import locked
    from vrt.services import load_environment
    from vrt.stages import CHECKPOINTS

    os.environ.update(load_environment())
    changes_files = args.action in ("adopt", "repair", "prune") or (args.action == "fetch" and not args.to)
    if not changes_files or getattr(args, "dry_run", False):
        return args.act(args)
    # A trainer in this folder saves, publishes and prunes by itself.
    with locked(CHECKPOINTS):
        return args.act(args)


def _desk(args: argparse.Namespace):
    from vrt.stages.checkpoints import open_desk

    return open_desk(args.lineage, args.params)


def _list(args: argparse.Namespace) -> int:
    from vrt.checkpoint.errors import CheckpointError

    desk = _desk(args)
    rows = []
    published = desk.store.published() if desk.store else {}
    for candidate in desk.known:
        row: dict[str, Any] = {"step": candidate.step, "saved": None, "bytes": None}
        try:
            manifest = desk.manifest(candidate)
            row |= {"saved": manifest.origin.get("created"), "bytes": manifest.size}
        except CheckpointError as error:
            log.warning("step %d: %s", candidate.step, error)
        entry = candidate.registered
        row |= {"val_psnr": entry.psnr if entry else None, "pinned": bool(entry and entry.pinned)}
        row |= {"local": candidate.local, "store": candidate.step in published, "registered": entry is not None}
        rows.append(row)
    _print(args, desk.lineage, rows)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from vrt.stages.checkpoints import verify_all

    desk = _desk(args)
    rows = []
    for found in verify_all(desk, desk.chosen(args.steps)):
        registry = "registered" if found.registered else "unregistered"
        sides = {"local": found.local.state.value, "store": found.store.state.value, "registry": registry}
        rows.append({"step": found.step, **sides, "problems": found.problems(desk.local_counts)})
    _print(args, desk.lineage, rows)
    bad = [row["step"] for row in rows if row["problems"]]
    if bad:
        log.error("%d of %d checkpoints have problems; `vrt checkpoints repair` mends what can be mended", len(bad), len(rows))
    return 1 if bad else 0


def _repair(args: argparse.Namespace) -> int:
    from vrt.stages.checkpoints import repair_all

    desk = _desk(args)
    done = repair_all(desk, desk.chosen(args.steps), args.dry_run)
    _print(args, desk.lineage, [{"step": one.step, "what": one.what.value, "failure": one.failure} for one in done])
    return 1 if any(one.failure for one in done) else 0


def _show(args: argparse.Namespace) -> int:
    desk = _desk(args)
    (candidate,) = desk.chosen([args.step])
    manifest = desk.manifest(candidate)
    entry = candidate.registered
    about = {
        "lineage": manifest.lineage,
        "step": manifest.step,
        "digest": manifest.digest,
        "local": str(desk.folder.path) if candidate.local else None,
        "store": candidate.address,
        "registered": entry is not None,
        "pinned": bool(entry and entry.pinned),
        "metrics": manifest.metrics,
        "origin": manifest.origin,
    }
    files = [asdict(file) for file in manifest.files]
    if args.json:
        print(json.dumps(about | {"files": files, "identity": manifest.identity}, indent=2))
        return 0
    flat = {key: value for key, value in about.items() if not isinstance(value, dict)} | manifest.metrics | manifest.origin
    _table(f"{manifest.lineage} step {manifest.step}", [{"what": key, "value": value} for key, value in flat.items()])
    _table("files", files)
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from vrt.stages.checkpoints import fetch_step

    desk = _desk(args)
    path = fetch_step(desk, args.step, args.to)
    print(json.dumps({"lineage": desk.lineage, "folder": str(path)}) if args.json else path)
    return 0


def _prune(args: argparse.Namespace) -> int:
    from vrt.params import load_params
    from vrt.stages.checkpoints import prune_by_policy, prune_steps

    desk = _desk(args)
    if args.step is not None:
        verdicts = prune_steps(desk, desk.chosen([args.step]), args.dry_run)
    elif args.after is not None:
        desk.chosen([args.after])
        verdicts = prune_steps(desk, [candidate for candidate in desk.known if candidate.step > args.after], args.dry_run)
    else:
        verdicts = prune_by_policy(desk, load_params(args.params).checkpoints, args.dry_run)
    deleted = "would be deleted" if args.dry_run else "deleted"
    _print(args, desk.lineage, [{"step": one.step, "what": "kept" if one.keep else deleted, "because": one.reason} for one in verdicts])
    return 0


def _pin(args: argparse.Namespace) -> int:
    return _set_pin(args, True)


def _unpin(args: argparse.Namespace) -> int:
    return _set_pin(args, False)


def _set_pin(args: argparse.Namespace, pinned: bool) -> int:
    desk = _desk(args)
    desk.registry.pin(args.step, pinned)
    log.info("%s step %d is %s", desk.lineage, args.step, "kept until you unpin it" if pinned else "not pinned")
    return 0


def _settle(args: argparse.Namespace) -> int:
    from vrt.checkpoint.claims import claims_on
    from vrt.checkpoint.lease import is_abandoned

    registry = _desk(args).registry
    settled = registry.settle(lambda: is_abandoned(claims_on(registry)))
    said = "was killed; its run in MLflow says so now" if settled else "its run in MLflow is right as it is"
    log.info("%s: %s", registry.lineage.id, said)
    return 0


def _adopt(args: argparse.Namespace) -> int:
    from vrt.stages.checkpoints import adopt_files

    manifest = adopt_files(args.folder, args.params)
    log.info("%s: adopted step %d (%.1f MB); `vrt train` registers it and goes on from it", manifest.lineage, manifest.step, manifest.size / 1e6)
    if args.json:
        print(json.dumps({"lineage": manifest.lineage, "step": manifest.step, "digest": manifest.digest}))
    return 0


def _print(args: argparse.Namespace, lineage: str, rows: Sequence[dict[str, Any]]) -> None:
    if args.json:
        print(json.dumps({"lineage": lineage, "checkpoints": rows}, indent=2))
    else:
        _table(lineage, rows)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*(key.replace("_", " ") for key in rows[0]), title=title)
    for row in rows:
        table.add_row(*(Text(_in_words(key, value), style=_STYLES.get(str(value), "")) for key, value in row.items()))
    # A file or a pipe gets whole lines: a digest broken in two can't be copied.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


_STYLES = {"healthy": "green", "missing": "yellow", "damaged": "red", "unregistered": "yellow"}


def _in_words(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if value is None:
        return "-"
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return f"{value / 1e6:.1f} MB" if key in ("bytes", "size") else f"{value:.3f}" if isinstance(value, float) else str(value)
