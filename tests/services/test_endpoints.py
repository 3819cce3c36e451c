"""Which services a command uses, and the environment that says so."""

import pytest

from vrt.services.endpoints import Endpoints, choose, environment, given

LOCAL = Endpoints("http://127.0.0.1:9000", "http://127.0.0.1:5000", "http://127.0.0.1:4200/api", "vrt-key", "hush")
NOWHERE = Endpoints(None, None, None)


def test_without_a_word_from_the_environment_everything_is_local():
    assert given({}, LOCAL) == {}
    assert choose({}, LOCAL) == LOCAL


@pytest.mark.parametrize(
    ("name", "variable", "address"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "https://mlflow.example"),
        ("prefect", "PREFECT_API_URL", "https://prefect.example/api"),
        ("s3", "MLFLOW_S3_ENDPOINT_URL", "https://s3.example"),
        ("s3", "AWS_ENDPOINT_URL_S3", "https://s3.example"),
        ("s3", "AWS_ENDPOINT_URL", "https://s3.example"),
    ],
)
def test_what_the_environment_names_is_used_and_the_rest_is_local(name, variable, address):
    environ = {variable: address}
    assert given(environ, LOCAL) == {name: address}
    chosen = choose(environ, LOCAL)
    assert getattr(chosen, name) == address
    others = {"s3", "mlflow", "prefect"} - {name}
    assert all(getattr(chosen, other) == getattr(LOCAL, other) for other in others)


def test_an_empty_variable_names_nothing():
    assert given({"MLFLOW_TRACKING_URI": "", "AWS_ENDPOINT_URL": ""}, LOCAL) == {}


def test_our_own_exports_do_not_count_as_given():
    exported = environment(LOCAL, {})
    assert given(exported, LOCAL) == {}
    assert choose(exported, LOCAL) == LOCAL


def test_the_environment_of_local_services_is_complete():
    added = environment(LOCAL, {"PATH": "/bin"})
    assert added == {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "vrt-key",
        "AWS_SECRET_ACCESS_KEY": "hush",
    }


def test_where_nothing_was_started_only_telemetry_and_patience_are_set():
    added = environment(NOWHERE, {})
    assert added["DO_NOT_TRACK"] == "1"
    assert not any(variable.startswith("AWS_") or variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL") for variable in added)


@pytest.mark.parametrize("variable", ["DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_HTTP_REQUEST_TIMEOUT", "AWS_DEFAULT_REGION"])
def test_what_the_user_set_stays(variable):
    assert variable not in environment(LOCAL, {variable: "mine"})


def test_keys_of_another_store_are_not_shown_to_the_local_one():
    added = environment(LOCAL, {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "theirs", "AWS_SESSION_TOKEN": "token"})
    assert (added["AWS_ACCESS_KEY_ID"], added["AWS_SECRET_ACCESS_KEY"], added["AWS_SESSION_TOKEN"]) == ("vrt-key", "hush", "")


def test_local_keys_are_not_shown_to_a_store_of_the_users():
    environ = {"AWS_ENDPOINT_URL_S3": "https://s3.example", "AWS_ACCESS_KEY_ID": "AKIA"}
    added = environment(choose(environ, LOCAL), environ)
    assert added["MLFLOW_S3_ENDPOINT_URL"] == "https://s3.example"
    assert not any("hush" in value or "vrt-key" in value for value in added.values())
    # AWS_ENDPOINT_URL would redirect the token service as well; cluster nodes find their credentials by the metadata service.
    assert not {"AWS_ENDPOINT_URL", "AWS_EC2_METADATA_DISABLED", "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION"} & set(added)


@pytest.mark.parametrize(
    ("environ", "exempt"),
    [
        ({}, None),
        ({"HTTP_PROXY": "http://proxy:3128"}, "127.0.0.1,localhost"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "intranet"}, "intranet,127.0.0.1,localhost"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.1"}, None),
        ({"http_proxy": "http://proxy:3128", "NO_PROXY": "*"}, None),
    ],
)
def test_a_proxy_is_not_asked_for_this_machine(environ, exempt):
    added = environment(LOCAL, environ)
    assert added.get("no_proxy") == added.get("NO_PROXY") == exempt


def test_the_secret_is_not_in_the_representation():
    assert "hush" not in repr(LOCAL)
