"""`vrt init`: start from a recipe."""

from pathlib import Path

from vrt.observe import log
from vrt.params import load_params
from vrt.stages.recipes import find_recipe, has_dataset, import_command
from vrt.typed_yaml import ParamsError


def write_recipe(name: str, target: Path) -> None:
    """Copy a recipe to `target`; `name` may be the beginning of its name, such as 006.

    Raises ParamsError where there is no such recipe, or `target` exists: nothing is overwritten.
    """
    recipe = find_recipe(name)
    if target.exists():
        raise ParamsError(f"{target}: exists already, and may hold your changes; move it away, or write to another file with --params")
    params = load_params(recipe)
    target.write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
    first = "" if has_dataset(params) else f"`{import_command(params.data.dataset)}` ({target} says what that copy holds), then "
    log.info("%s: recipe %s; next: %sdvc repro", target, recipe.stem, first)
