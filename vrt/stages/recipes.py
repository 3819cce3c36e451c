"""`vrt recipes`: the params files to start from, and what each needs."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from rich.table import Table

from vrt.data.cli import RAW
from vrt.data.layouts import LAYOUTS
from vrt.model.network import VRT
from vrt.params import Network, Params, load_params
from vrt.typed_yaml import ParamsError

RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True)
class Recipe:
    """What `vrt recipes` tells of a params file."""

    name: str
    title: str
    """The first line of the file."""
    dataset: str
    dataset_here: bool
    """Whether `data/raw/` has it."""
    frames: int
    """Of a training clip, as the network gets it."""
    side: int
    """Height and width of such a frame, in pixels."""
    batch_size: int
    parameters: int
    steps: int


def find_recipe(name: str) -> Path:
    """The file of a recipe, given its name or the beginning of it, such as 006. Raises ParamsError where that is none, or several."""
    paths = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    found = [name] if name in paths else [stem for stem in paths if name and stem.startswith(name)]
    if len(found) != 1:
        problem = f"could be any of: {', '.join(found)}" if found else f"not found in {RECIPES}; there are: {', '.join(paths)}"
        raise ParamsError(f"recipe {name!r}: {problem}")
    return paths[found[0]]


def all_recipes() -> list[Recipe]:
    """Every recipe, by name. Raises ParamsError where one is no params file."""
    return [describe(path) for path in sorted(RECIPES.glob("*.yaml"))]


def describe(path: Path) -> Recipe:
    """A recipe, by its file. Raises ParamsError where that is no params file."""
    params = load_params(path)
    return Recipe(
        name=path.stem,
        title=path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").rstrip("."),
        dataset=params.data.dataset,
        dataset_here=has_dataset(params),
        frames=params.train.frames,
        side=params.train.crop // params.network.upscale,
        batch_size=params.train.batch_size,
        parameters=sum(parameter.numel() for parameter in outline(params.network).parameters()),
        steps=params.train.total_steps,
    )


def has_dataset(params: Params) -> bool:
    """Whether the data set of a params file was brought in."""
    return (RAW / params.data.dataset / "dataset.yaml").is_file()


def import_command(dataset: str) -> str:
    """The command that brings in a user's copy of a data set that recipes name; published ones are called as their layout."""
    layout = f" --layout {dataset}" if dataset in LAYOUTS else ""
    return f"vrt data import YOUR_COPY --name {dataset}{layout}"


@cache
def outline(settings: Network) -> VRT:
    """The network of a params file with shapes and no content, which takes little time and no memory."""
    with torch.device("meta"):
        return VRT(**settings.model_dump())


def as_json(recipes: list[Recipe]) -> str:
    """A list of objects, with the fields of `Recipe` and what its data set needs."""
    rows = [
        asdict(recipe) | {"data_folders": _folders(recipe.dataset), "data_import": None if recipe.dataset_here else import_command(recipe.dataset)}
        for recipe in recipes
    ]
    return json.dumps(rows, indent=2)


def recipe_table(recipes: list[Recipe]) -> Table:
    """One row per recipe. Fits a terminal of 80 columns."""
    table = Table(caption="input: frames x height x width; start from one: vrt init --recipe 006", caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("task")
    table.add_column("data set", no_wrap=True)
    table.add_column("input", justify="right", no_wrap=True)
    table.add_column("param.", justify="right", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    for recipe in recipes:
        number = recipe.name.split("_")[0]
        shape = f"{recipe.frames}x{recipe.side}x{recipe.side}"
        table.add_row(number, recipe.title, recipe.dataset, shape, f"{recipe.parameters / 1e6:.1f} M", f"{recipe.steps:,}")
    return table


def dataset_table(recipes: list[Recipe]) -> Table:
    """What the recipes need: one row per data set. Fits a terminal of 80 columns."""
    table = Table(caption="bring one in: vrt data import YOUR_COPY --name DATA_SET --layout DATA_SET", caption_justify="left")
    table.add_column("data set", no_wrap=True)
    table.add_column("for")
    table.add_column("what your copy holds", overflow="fold")
    table.add_column("here", no_wrap=True)
    needing: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        needing.setdefault(recipe.dataset, []).append(recipe)
    for dataset, users in needing.items():
        numbers = ", ".join(recipe.name.split("_")[0] for recipe in users)
        here = users[0].dataset_here
        table.add_row(dataset, numbers, _folders(dataset) or ("nothing to bring in" if here else "your own clips"), "yes" if here else "no")
    return table


def _folders(dataset: str) -> str | None:
    return LAYOUTS[dataset].folders if dataset in LAYOUTS else None
