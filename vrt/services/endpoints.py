"""Which MLflow, Prefect and S3 a command talks to: those of the environment, else the local services. Pure functions, no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# The variables that give a service, strongest first, as MLflow, Prefect and boto3 read them.
GIVEN_BY = {
    "s3": ("MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "mlflow": ("MLFLOW_TRACKING_URI",),
    "prefect": ("PREFECT_API_URL",),
}
REGION = "us-east-1"

_TELEMETRY_OFF = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # MLflow ignores DO_NOT_TRACK=1
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
}
# With MLflow's own defaults one call to a server that is gone blocks for four minutes; with these for five seconds.
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Endpoints:
    """Addresses of the three services; None where there is none: not given, and never started here."""

    s3: str | None
    mlflow: str | None
    prefect: str | None
    access_key: str | None = None
    """Key of the local S3 server, else None: credentials of the environment are left where they are."""
    secret_key: str | None = field(default=None, repr=False)


def given(environ: Mapping[str, str], local: Endpoints) -> dict[str, str]:
    """The services that the environment gives, by name: whatever differs from what `vrt services env` itself exports."""
    found = {}
    for name, variables in GIVEN_BY.items():
        address = next((environ[variable] for variable in variables if environ.get(variable)), None)
        if address and address != getattr(local, name):
            found[name] = address
    return found


def choose(environ: Mapping[str, str], local: Endpoints) -> Endpoints:
    """The endpoints to use: each one the environment gives, else the local one."""
    theirs = given(environ, local)
    keys = {} if "s3" in theirs else {"access_key": local.access_key, "secret_key": local.secret_key}
    return Endpoints(**{name: theirs.get(name, getattr(local, name)) for name in GIVEN_BY}, **keys)


def environment(endpoints: Endpoints, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables a child process needs on top of `environ` to reach `endpoints`. What the user has set stays as it is."""
    defaults = _TELEMETRY_OFF | _MLFLOW_PATIENCE
    if endpoints.mlflow:
        defaults["MLFLOW_TRACKING_URI"] = endpoints.mlflow
    if endpoints.prefect:
        defaults["PREFECT_API_URL"] = endpoints.prefect
    if endpoints.s3:
        defaults["MLFLOW_S3_ENDPOINT_URL"] = endpoints.s3
        # For a store of the user's, name S3 alone: AWS_ENDPOINT_URL would also redirect the token service that some clusters sign in with.
        defaults["AWS_ENDPOINT_URL" if endpoints.access_key else "AWS_ENDPOINT_URL_S3"] = endpoints.s3
    if endpoints.access_key:
        defaults |= {"AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true"}
    added = {variable: value for variable, value in defaults.items() if variable not in environ}
    if endpoints.access_key and endpoints.secret_key:
        # Keys open one store only: those the user has for another are replaced, or the local one would refuse them.
        added |= {"AWS_ACCESS_KEY_ID": endpoints.access_key, "AWS_SECRET_ACCESS_KEY": endpoints.secret_key}
        if environ.get("AWS_SESSION_TOKEN"):
            added["AWS_SESSION_TOKEN"] = ""
    return added | _past_proxies(environ)


def _past_proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Keep requests to this machine away from an HTTP proxy, which could not reach its loopback."""
    if not any(environ.get(variable) for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
        return {}
    exempt = [host for host in (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(",") if host]
    if "*" in exempt or set(_LOOPBACK) <= set(exempt):
        return {}
    joined = ",".join(dict.fromkeys((*exempt, *_LOOPBACK)))
    return {"no_proxy": joined, "NO_PROXY": joined}
