"""What makes a published checkpoint a model that MLflow loads: `mlflow.pyfunc.load_model("models:/vrt-NAME/VERSION").predict(clip)`."""

import io
import json
import platform
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vrt
from vrt.checkpoint.manifest import Manifest
from vrt.params import Noise, Params
from vrt.serving import SETTINGS
from vrt.training.session import released

CODE = "code.zip"
SHIPPED = (
    *("__init__.py", "serving.py", "model/*.py", "data/__init__.py", "data/degradations.py"),
    *("evaluation/__init__.py", "evaluation/tiling.py", "evaluation/between.py"),
)
REQUIREMENTS = ("mlflow", "torch", "numpy")


def predictor_files(params: Params) -> Callable[[Manifest], Mapping[str, bytes]]:
    """Makes the files that go beside a checkpoint of these params, by name; with the code as it is now, which is what trains."""
    code = shipped_code()
    requirements = "".join(f"{name}=={version(name)}\n" for name in REQUIREMENTS).encode()
    environment = _yaml({"python": platform.python_version(), "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]})

    def files(manifest: Manifest) -> dict[str, bytes]:
        weights = released(manifest)
        if weights is None:
            return {}
        settings = {
            "weights": weights.name,
            "sha256": weights.sha256,
            "network": params.network.model_dump(mode="json"),
            "tile": params.evaluate.tile,
            "overlap": params.evaluate.overlap,
            "sigma": params.degradation.sigma_test if isinstance(params.degradation, Noise) else None,
        }
        described = {"MLmodel": ml_model(params, manifest.step), SETTINGS: _yaml(settings)}
        return described | {CODE: code, "requirements.txt": requirements, "python_env.yaml": environment}

    return files


def shipped_code() -> bytes:
    """The modules that a predictor needs, zipped, the same bytes each time; Python imports from it as it is."""
    root = Path(vrt.__file__).parent
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for pattern in SHIPPED for path in root.glob(pattern)):
            # Without a date of its own: the oldest that the format knows.
            file.writestr(zipfile.ZipInfo(f"vrt/{path.relative_to(root)}"), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def ml_model(params: Params, step: int) -> bytes:
    """MLflow's description of a model: how to load it, and what goes in and out."""

    # Without a name: under one, MLflow would want a mapping instead of the array. It wants this part as text.
    clip = json.dumps([{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, -1, -1, 3]}}])
    told = []
    if params.network.nonblind_denoising:
        assert isinstance(params.degradation, Noise)
        told = [{"name": "sigma", "type": "double", "default": float(params.degradation.sigma_test), "shape": None}]
    pyfunc = {
        "loader_module": "vrt.serving",
        "code": CODE,
        "env": {"virtualenv": "python_env.yaml"},
        "python_version": platform.python_version(),
    }
    return _yaml(
        {
            "flavors": {"python_function": pyfunc},
            "mlflow_version": version("mlflow"),
            "metadata": {"step": step, "task": params.degradation.kind, "upscale": params.network.upscale},
            "signature": {"inputs": clip, "outputs": clip, "params": json.dumps(told) if told else None},
        }
    )


def _yaml(tree: Any) -> bytes:
    """JSON is YAML, and comes out the same every time."""
    return json.dumps(tree, indent=1).encode() + b"\n"
