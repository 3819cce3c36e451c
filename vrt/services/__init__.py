"""MLflow, Prefect and S3 on this machine, for whoever has no such servers."""

from vrt.services.endpoints import Endpoints
from vrt.services.local import ServiceState, down, load_environment, status, up
from vrt.services.state import ServiceError

__all__ = ["Endpoints", "ServiceError", "ServiceState", "down", "load_environment", "status", "up"]
