"""Between a trainer and a real server: an HTTP proxy that passes everything on, except where it was told to spoil it."""

import http.client
import threading
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
# Hop by hop, or written anew here.
_NOT_PASSED_ON = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


class Fault(StrEnum):
    """What goes wrong with one request. The first four leave the server as it is."""

    BUSY = "503"
    SILENCE = "silence"
    """The request is taken and never answered."""
    REFUSED = "refused"
    """The connection is closed without a word."""
    CUT_ANSWER = "cut answer"
    WRONG_ANSWER = "wrong answer"
    """One bit of what is downloaded is another."""
    CUT_UPLOAD = "cut upload"
    """The server gets half of a body and then nothing more."""
    WRONG_UPLOAD = "wrong upload"
    """One bit of what the server gets is another."""

    def can_hit(self, method: str, has_body: bool) -> bool:
        if self in (Fault.CUT_ANSWER, Fault.WRONG_ANSWER):
            return method == "GET"
        if self in (Fault.CUT_UPLOAD, Fault.WRONG_UPLOAD):
            return method == "PUT" and has_body
        return True


class FaultProxy:
    """Listens on a port of its own in front of `upstream` (http://host:port). Use it as a context manager."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.choose: Callable[[str, str, bool], Fault | None] = lambda method, path, has_body: None
        """The fault of a request, by its method, its path, and whether it has a body."""
        self.after_half_an_upload: Callable[[], None] = lambda: None
        self.told: Counter[Fault] = Counter()
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def do_GET(self) -> None:  # noqa: N802
        body = self._body()
        fault = self.proxy.choose(self.command, self.path, bool(body))
        if fault and fault.can_hit(self.command, bool(body)):
            self.proxy.told[fault] += 1
        else:
            fault = None
        match fault:
            case Fault.BUSY:
                return self._answer(503, [("Content-Type", "application/xml")], _BUSY)
            case Fault.SILENCE:
                self.proxy.over.wait()
                self.close_connection = True
                return None
            case Fault.REFUSED:
                self.close_connection = True
                return None
            case Fault.CUT_UPLOAD:
                self._upstream(body, len(body) // 2).close()
                self.proxy.after_half_an_upload()
                self.close_connection = True
                return None
        try:
            connection = self._upstream(_spoiled(body) if fault == Fault.WRONG_UPLOAD else body)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            # The server is gone: so is the connection to it.
            self.close_connection = True
            return None
        connection.close()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _NOT_PASSED_ON]
        if fault == Fault.WRONG_ANSWER:
            content = _spoiled(content)
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        return self._answer(response.status, headers, content, cut=fault == Fault.CUT_ANSWER, length=length)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _upstream(self, body: bytes, delivered: int | None = None) -> http.client.HTTPConnection:
        """Pass the request on, with the first `delivered` bytes of its body. Signatures cover the host, so that stays as the client wrote it."""
        connection = http.client.HTTPConnection(self.proxy.upstream.hostname, self.proxy.upstream.port, timeout=120)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _NOT_PASSED_ON:
                connection.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[:delivered])
        return connection

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            # A trainer that gave up, or was killed.
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _spoiled(content: bytes) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[len(changed) // 2] ^= 1
    return bytes(changed)
