"""`vrt init`: start from a recipe."""

from pathlib import Path

from vrt.observe import log
from vrt.params import ParamsError, load_params

RECIPES = Path(__file__).parents[2] / "recipes"


def write_recipe(name: str, target: Path) -> None:
    """Copy a recipe to `target`. Raises ParamsError where there is no such recipe, or `target` exists: nothing is overwritten."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in names:
        raise ParamsError(f"recipe {name!r}: not found in {RECIPES}; there are: {', '.join(names)}")
    if target.exists():
        raise ParamsError(f"{target}: exists already, and may hold your changes; move it away, or write to another file with --params")
    load_params(RECIPES / f"{name}.yaml")
    target.write_text((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    log.info("%s: recipe %s; next: dvc repro", target, name)
