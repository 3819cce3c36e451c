"""What tests of trainings ask the real registry."""

from collections.abc import Callable

import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion


@pytest.fixture(scope="session")
def versions_of(local_services) -> Callable[[str], list[ModelVersion]]:
    """What the real registry has of a training by its name, oldest first, asked past our own code."""
    client = MlflowClient(local_services.environment["MLFLOW_TRACKING_URI"])
    return lambda name: sorted(client.search_model_versions(f"name = 'vrt-{name}'", max_results=1000), key=lambda version: int(version.version))
