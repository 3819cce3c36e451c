"""The command line: parse, prepare the environment, call, and turn errors into exit codes."""

import argparse
import os
import traceback
from pathlib import Path
from typing import NoReturn

from vrt.checkpoint.errors import exit_code_of
from vrt.checkpoint.phases import Phase
from vrt.lifecycle import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    MACHINES,
    MEET,
    PROCESSES,
    RESUME,
    launchers,
    leave,
    torchrun_rank,
)


def program() -> NoReturn:
    """`vrt`: run the command that the command line asks for, and end the process with its exit code."""
    launchers()
    try:
        code = main()
    except Exception:
        # Python would say so itself, but then wait for what may not end.
        traceback.print_exc()
        code = EXIT_FAILED
    leave(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns an exit code of vrt.lifecycle."""
    args = parser().parse_args(argv)
    from vrt.observe import log, set_up_logging

    set_up_logging(torchrun_rank() or 0)
    try:
        return args.run(args)
    except OSError as error:
        log.error("%s: %s; free space there or mend the rights, and run the same again", error.filename or "a file", error.strerror or error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        log.error("interrupted; what was registered before is safe")
        return EXIT_INTERRUPTED
    except (ValueError, RuntimeError, FloatingPointError) as error:
        log.error("%s", error, exc_info=_is_ours_to_fix(error))
        return exit_code_of(error)


def _is_ours_to_fix(error: Exception) -> bool:
    """An error raised by our own code explains itself; one that a library raised is a defect and needs its traceback."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return not Path(raised_in).is_relative_to(Path(__file__).parent)


def parser() -> argparse.ArgumentParser:
    """All commands and their options; each sets `run`, which takes what was parsed and returns an exit code."""
    top = argparse.ArgumentParser(prog="vrt", description="Train VRT so that nothing is lost, whatever is killed.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    from vrt.data.cli import add_parser as add_data
    from vrt.services.cli import add_parser as add_services
    from vrt.stages.checkpoints_cli import add_parser as add_checkpoints
    from vrt.stages.promote import add_parser as add_promote
    from vrt.stages.reproduce import add_parser as add_reproduce
    from vrt.stages.restore_cli import add_parser as add_restore
    from vrt.stages.weights import add_parser as add_weights

    add_services(commands)
    add_data(commands)
    add_checkpoints(commands)
    add_promote(commands)
    add_reproduce(commands)
    add_restore(commands)
    add_weights(commands)
    for name, run, described in (
        ("train", _train, "train, or go on training, to the end of the params file"),
        ("evaluate", _evaluate, "measure the trained model on the test clips"),
    ):
        command = commands.add_parser(name, help=described)
        command.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
        command.set_defaults(run=run)
        if name == "evaluate":
            of = "instead of the trained model: latest, best, champion, LINEAGE@STEP, RUN@STEP, or a file of weights, such as a published one"
            command.add_argument("--checkpoint", metavar="CHECKPOINT", help=of)
            command.add_argument("--dataset", metavar="NAME", help="with --checkpoint: a folder below data/raw/, for its test clips")
        if name == "train":
            told = f"overrides checkpoints.resume (as ${RESUME} does): auto, must, never, a step to go back to, or 'fork LINEAGE@STEP'"
            command.add_argument("--resume", metavar="POLICY", default=os.environ.get(RESUME) or None, help=told)
            _add_processes(command)
            told = f"where the machines meet (or ${MEET}): a free port of one of them"
            command.add_argument("--meet", metavar="HOST:PORT", default=os.environ.get(MEET) or None, help=told)
    recipes = commands.add_parser("recipes", help="list the recipes: the nine published trainings and the quickstart, and what each needs")
    recipes.add_argument("--json", action="store_true", help="as JSON, for programs")
    recipes.set_defaults(run=_recipes)
    init = commands.add_parser("init", help="write a recipe as params.yaml")
    init.add_argument("--recipe", required=True, help="a recipe that `vrt recipes` lists, by name or number, such as quickstart or 006")
    init.add_argument("--params", type=Path, default=Path("params.yaml"), help="file to write (default: params.yaml)")
    init.set_defaults(run=_init)
    doctor = commands.add_parser("doctor", help="whether all that a training needs is there and works, and how to mend what does not")
    doctor.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    doctor.add_argument("--json", action="store_true", help="for programs")
    _add_processes(doctor)
    doctor.add_argument("--before-preparing", action="store_true", help="look at the raw data set alone: data/prepared/ is made anew after that")
    doctor.set_defaults(run=_doctor)
    drill = commands.add_parser("drill", help="prove by killing, on your own services and recipe, that nothing is lost")
    drill.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (default: params.yaml)")
    phases = f"kill at this phase, one of {', '.join(Phase)}; repeat for more"
    drill.add_argument("--phase", type=Phase, choices=list(Phase), action="append", default=[], metavar="PHASE", help=phases)
    drill.add_argument("--kills", type=_positive, help="how many (default: once in each phase, or at each --phase)")
    drill.add_argument("--seed", type=int, default=0, help="the same seed kills at the same phases (default: 0)")
    drill.add_argument("--steps", type=_positive, default=12, help="train at least this far; the twin that is left alone trains as far (default: 12)")
    drill.add_argument("--every", type=_positive, default=2, help="steps between two checkpoints of the drill (default: 2)")
    drill.set_defaults(run=_drill)
    commands.add_parser("demo", help="everything at once: services, data, training, evaluation, and where to look").set_defaults(run=_demo)
    return top


def _add_processes(command: argparse.ArgumentParser) -> None:
    told = f"overrides train.processes (as ${PROCESSES} does): processes on this machine, or auto, one per GPU"
    command.add_argument("--processes", metavar="N", type=_processes, default=os.environ.get(PROCESSES) or None, help=told)
    told = f"machines that train together (or ${MACHINES}): run the same command on each, with the same --meet"
    command.add_argument("--machines", metavar="N", type=_positive, default=os.environ.get(MACHINES) or 1, help=told)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number from 1 on")
    return int(text)


def _processes(text: str) -> int | str:
    if text != "auto" and (not text.isdecimal() or not int(text)):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected auto, or a number from 1 on")
    return text if text == "auto" else int(text)


def _lead_to_services() -> None:
    from vrt.services import load_environment

    os.environ.update(load_environment())


def _train(args: argparse.Namespace) -> int:
    from vrt.stages.together import train_together
    from vrt.stages.train import run_training

    _lead_to_services()
    if (code := train_together(args.params, args.resume, args.processes, args.machines, args.meet)) is not None:
        return code
    return run_training(args.params, args.resume)


def _evaluate(args: argparse.Namespace) -> int:
    from vrt.stages.evaluate import run_evaluation

    _lead_to_services()
    return run_evaluation(args.params, args.checkpoint, args.dataset)


def _recipes(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vrt.stages.recipes import all_recipes, as_json, dataset_table, recipe_table

    recipes = all_recipes()
    if args.json:
        print(as_json(recipes))
    else:
        Console().print(recipe_table(recipes), dataset_table(recipes))
    return EXIT_DONE


def _doctor(args: argparse.Namespace) -> int:
    from vrt.stages.doctor import run_doctor

    _lead_to_services()
    return run_doctor(args.params, args.processes, args.machines, args.json, args.before_preparing)


def _drill(args: argparse.Namespace) -> int:
    from vrt.stages.drill import run_drill

    _lead_to_services()
    return run_drill(args.params, args.kills, args.phase, args.seed, args.steps, args.every)


def _init(args: argparse.Namespace) -> int:
    from vrt.stages.init import write_recipe

    write_recipe(args.recipe, args.params)
    return EXIT_DONE


def _demo(_args: argparse.Namespace) -> int:
    from vrt.stages.demo import run_demo

    return run_demo()
