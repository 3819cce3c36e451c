"""Imports flow down only, and each service is known to one module: what keeps a part replaceable and `vrt --help` quick."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

# Each part, by its longest matching name, and what it may import of ours: nothing else, besides itself.
_MODEL_DATA_CHECKPOINT = {"vrt.model", "vrt.data", "vrt.checkpoint"}
_GROUND = {"vrt.typed_yaml", "vrt.params", "vrt.observe", "vrt.lifecycle", "vrt.status", "vrt.distributed"}
_MLFLOW = {"vrt.checkpoint.tracking", "vrt.checkpoint.registry"}
_MIDDLE = {"vrt.training", "vrt.evaluation", *_MLFLOW, "vrt.checkpoint.curator", "vrt.checkpoint.claims"}
MAY_IMPORT: Mapping[str, set[str]] = {
    "vrt.typed_yaml": set(),
    "vrt.params": {"vrt.typed_yaml"},
    "vrt.observe": set(),
    "vrt.lifecycle": {"vrt.observe"},
    "vrt.status": {"vrt.observe"},
    "vrt.distributed": {"vrt.lifecycle"},
    "vrt.model": _GROUND,
    "vrt.data": _GROUND,
    "vrt.checkpoint": _GROUND,
    "vrt.checkpoint.tracking": _GROUND | {"vrt.checkpoint"},
    "vrt.checkpoint.registry": _GROUND | {"vrt.checkpoint"} | _MLFLOW,
    "vrt.checkpoint.curator": _GROUND | {"vrt.checkpoint"} | _MLFLOW,
    "vrt.checkpoint.claims": _GROUND | {"vrt.checkpoint"} | _MLFLOW,
    "vrt.training": _GROUND | _MODEL_DATA_CHECKPOINT,
    "vrt.evaluation": _GROUND | _MODEL_DATA_CHECKPOINT,
    "vrt.machine": set(),
    "vrt.serving": {"vrt.model", "vrt.data", "vrt.evaluation"},
    "vrt.services": {"vrt.observe"},
    "vrt.stages": _GROUND | _MODEL_DATA_CHECKPOINT | _MIDDLE | {"vrt.services", "vrt.serving", "vrt.machine", "vrt"},
    "vrt.cli": _GROUND | _MODEL_DATA_CHECKPOINT | _MIDDLE | {"vrt.services", "vrt.stages"},
    "vrt.__main__": {"vrt.cli"},
    "vrt": set(),
    "pipelines": {"vrt.services", "vrt.params", "vrt.typed_yaml", "vrt.lifecycle", "vrt.status"},
}
# Where each foreign package may appear.
ONLY_IN = {
    "mlflow": {"vrt.checkpoint.registry", "vrt.checkpoint.tracking", "vrt.services"},
    "boto3": {"vrt.checkpoint.store", "vrt.services"},
    "botocore": {"vrt.checkpoint.store", "vrt.services"},
    "prefect": {"pipelines", "vrt.services"},
}


def part_of(module: str) -> str:
    """The part that a module of ours belongs to. `import vrt` alone takes nothing from any part."""
    matching = [part for part in MAY_IMPORT if module == part or (module.startswith(f"{part}.") and part != "vrt")]
    assert matching, f"{module} belongs to no part: enter it in MAY_IMPORT"
    return max(matching, key=len)


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that `source` imports, anywhere in it; `from package import name` counts as both package.name and package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    """Each import below `root` that the tables above forbid, in words."""
    found = []
    for path in sorted([*root.glob("vrt/**/*.py"), *root.glob("pipelines/**/*.py")]):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        own = part_of(module)
        for imported in imports(path.read_text(), module, path.name == "__init__.py"):
            top = imported.split(".")[0]
            if top in ONLY_IN and not any(f"{module}.".startswith(f"{place}.") for place in ONLY_IN[top]):
                found.append(f"{module} imports {imported}")
            if top in ("vrt", "pipelines") and part_of(imported) not in MAY_IMPORT[own] | {own}:
                found.append(f"{module} imports {imported}")
    return found


def test_imports_flow_down_only():
    assert violations(PROJECT) == []


@pytest.mark.parametrize(
    "file, line, forbidden",
    [
        ("vrt/params.py", "from vrt.observe import log", "vrt.observe.log"),
        ("vrt/model/block.py", "from vrt.data.clips import Clip", "vrt.data.clips.Clip"),
        ("vrt/data/clips.py", "import vrt.checkpoint.folder", "vrt.checkpoint.folder"),
        ("vrt/checkpoint/resume.py", "from vrt.checkpoint.registry import Lineage", "vrt.checkpoint.registry.Lineage"),
        ("vrt/checkpoint/folder.py", "from .registry import Lineage", "vrt.checkpoint.registry.Lineage"),
        ("vrt/checkpoint/folder.py", "from ..model import block", "vrt.model.block"),
        ("vrt/training/loop.py", "def f():\n    from vrt.evaluation.run import evaluate", "vrt.evaluation.run.evaluate"),
        ("vrt/evaluation/run.py", "from vrt import training", "vrt.training"),
        ("vrt/services/local.py", "from vrt.params import Params", "vrt.params.Params"),
        ("vrt/stages/train.py", "import pipelines.train", "pipelines.train"),
        ("vrt/stages/train.py", "import mlflow", "mlflow"),
        ("vrt/checkpoint/folder.py", "def f():\n    import boto3.session", "boto3.session"),
        ("vrt/checkpoint/registry.py", "from botocore import config", "botocore.config"),
        ("vrt/cli.py", "import prefect", "prefect"),
        ("pipelines/train.py", "from vrt.stages.train import run_training", "vrt.stages.train.run_training"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str, forbidden: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"import os\n{line}\n")
    module = file.removesuffix(".py").replace("/", ".")
    assert violations(tmp_path) == [f"{module} imports {forbidden}"]


def test_help_imports_nothing_slow():
    # Parsing the command line must not cost the seconds that these take to import.
    slow = ("torch", "mlflow", "prefect", "boto3")
    script = f"import sys, vrt.cli; vrt.cli.parser(); print(*(name for name in {slow} if name in sys.modules))"
    child = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert child.stdout.split() == []
