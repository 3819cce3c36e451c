"""An S3 server that is strict where the local services' one is lenient: OpenStack Swift with its S3 interface, all in this one process.

It refuses wrong checksums, keeps user metadata, honours conditional writes, and serves ranges as ranges.
Run it as `swift_server.py FOLDER PORT` (it takes the next three ports too); the keys are `test:tester` and `testing`. Started again on
the same folder after any kill, it has all that it acknowledged.
"""

# ruff: noqa: E402
import eventlet

eventlet.monkey_patch()

import configparser
import sys
from pathlib import Path
from time import time as now

from eventlet import wsgi
from swift.common.ring import RingBuilder
from swift.common.storage_policy import reload_storage_policies
from swift.common.utils import set_swift_dir
from swift.common.wsgi import SwiftHttpProtocol, loadapp

ROOT, PORT = Path(sys.argv[1]).resolve(), int(sys.argv[2])
SETTINGS = ROOT / "settings"
BACKENDS = {"account": PORT + 1, "container": PORT + 2, "object": PORT + 3}
PIPELINE = "catch_errors gatekeeper cache listing_formats bulk s3api tempauth copy slo dlo versioned_writes symlink"
OPTIONS = {
    "s3api": {"location": "us-east-1", "dns_compliant_bucket_names": "no", "auth_pipeline_check": "false"},
    "tempauth": {"user_test_tester": "testing .admin"},
    "slo": {"rate_limit_under_size": "0", "allow_async_delete": "false"},
    "versioned_writes": {"allow_versioned_writes": "true", "allow_object_versioning": "true"},
}


class Memory:
    """Memcached's part, for the only process there is."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[object, float]] = {}

    def get(self, key, raise_on_error=False):
        value, until = self._values.get(key, (None, 0.0))
        return value if not until or until > now() else None

    def set(self, key, value, serialize=True, time=0, min_compress_len=0, raise_on_error=False):
        self._values[key] = (value, now() + time if time else 0.0)

    def incr(self, key, delta=1, time=0):
        value = max(int(self.get(key) or 0) + delta, 0)
        self.set(key, value, time=time)
        return value

    def decr(self, key, delta=1, time=0):
        return self.incr(key, -delta, time)

    def delete(self, key, server_key=None):
        self._values.pop(key, None)


MEMORY = Memory()


def with_memory(_settings, **_options):
    """Paste's factory of the filter that stands where the cache does."""

    def wrap(app):
        def call(environ, start_response):
            environ["swift.cache"] = MEMORY
            return app(environ, start_response)

        return call

    return wrap


def write(name: str, sections: dict[str, dict[str, object]]) -> None:
    settings = configparser.RawConfigParser()
    settings.read_dict(sections)
    with (SETTINGS / name).open("w") as file:
        settings.write(file)


def configure() -> None:
    """Settings and rings: one device, one copy of everything."""
    SETTINGS.mkdir(parents=True, exist_ok=True)
    (ROOT / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    write(
        "swift.conf",
        {
            "swift-hash": {"swift_hash_path_prefix": "tests", "swift_hash_path_suffix": "tests"},
            "storage-policy:0": {"name": "only", "default": "yes"},
        },
    )
    common = {"swift_dir": SETTINGS, "bind_ip": "127.0.0.1"}
    for name, port in BACKENDS.items():
        builder = RingBuilder(4, 1, 0)
        place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
        builder.add_dev({"id": 0, "region": 1, "zone": 1, "device": "disk", "weight": 1.0, "meta": "", **place})
        builder.rebalance(seed=1)
        builder.get_ring().save(str(SETTINGS / f"{name}.ring.gz"))
        disk = {"devices": ROOT / "devices", "mount_check": "false", "fallocate_reserve": 0, "db_preallocation": "off", "log_requests": "false"}
        parts = {"pipeline:main": {"pipeline": "server"}, "app:server": {"use": f"egg:swift#{name}"}}
        write(f"{name}.conf", {"DEFAULT": common | disk | {"bind_port": port}, **parts})
    filters = {f"filter:{name}": {"use": f"egg:swift#{name}", **OPTIONS.get(name, {})} for name in PIPELINE.split()}
    filters["filter:cache"] = {"paste.filter_factory": "swift_server:with_memory"}
    # Swift looks for its proxy under this very name.
    proxy = {"use": "egg:swift#proxy", "account_autocreate": "true", "allow_account_management": "true"}
    parts = {"pipeline:main": {"pipeline": f"{PIPELINE} proxy-server"}, "app:proxy-server": proxy}
    write("proxy.conf", {"DEFAULT": common | {"bind_port": PORT}, **parts, **filters})


def serve(name: str, port: int) -> None:
    app = loadapp(str(SETTINGS / f"{name}.conf"), global_conf={"log_name": name, "log_level": "ERROR"})
    listener = eventlet.listen(("127.0.0.1", port), backlog=512)
    # S3 clients expect header names as they are, not capitalised.
    wsgi.server(listener, app, protocol=SwiftHttpProtocol, log_output=False, debug=False, capitalize_response_headers=False)


if __name__ == "__main__":
    sys.modules["swift_server"] = sys.modules["__main__"]
    configure()
    set_swift_dir(str(SETTINGS))
    reload_storage_policies()
    for server in [eventlet.spawn(serve, name, port) for name, port in {**BACKENDS, "proxy": PORT}.items()]:
        server.wait()
