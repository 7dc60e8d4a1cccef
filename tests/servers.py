"""Stores for the tests: a local directory, an S3 server (moto) and a GCS server (fake-gcs-server).

The servers run on free ports of loopback. They start at first use and end with the tests. fake-gcs-server is a Go
program: MMBEAM_FAKE_GCS names it, or it is on PATH, or Go builds it into .cache/bin. Without any of these, "gcs" is not
in STORES, and `report_header` says so.
"""

import atexit
import contextlib
import functools
import http.client
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

# Before gcsfs is imported: otherwise it waits a minute per bucket for a service that the server does not have.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import fsspec.config
from filelock import FileLock

BUCKET = "mmbeam-tests"
BUILT = Path(__file__).parent.parent / ".cache" / "bin" / "fake-gcs-server"
GCS_MODULE = "github.com/fsouza/fake-gcs-server@v1.56.1"

# Serves one request at a time: moto checks and puts in two steps, S3 in one.
MOTO = """
import sys
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(sys.argv[1]), DomainDispatcherApplication(create_backend_app), threaded=False)
"""


def find_fake_gcs() -> str | None:
    """Return the path of fake-gcs-server; None if it is not installed or built."""
    installed = os.environ.get("MMBEAM_FAKE_GCS") or shutil.which("fake-gcs-server")
    return installed or (str(BUILT) if BUILT.exists() else None)


STORES = ["local", "s3", *(["gcs"] if find_fake_gcs() or shutil.which("go") else [])]


def report_header() -> str:
    """Return the line of pytest's header that names the tested stores, and why one is missing."""
    missing = "" if "gcs" in STORES else "; not gcs: no fake-gcs-server (MMBEAM_FAKE_GCS, PATH) and no Go to build it"
    return f"stores: {', '.join(STORES)}{missing}"


def fresh_output(store: str, folder: Path) -> str:
    """Return the URL of an output directory that does not exist yet."""
    if store == "local":
        return str(folder / f"out-{uuid.uuid4().hex[:8]}")
    return f"{_bucket(store)}/out-{uuid.uuid4().hex[:8]}"


@functools.cache
def _bucket(store: str) -> str:
    return _s3() if store == "s3" else _gcs()


def _s3() -> str:
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "test"
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    _start([sys.executable, "-c", MOTO, str(port)], endpoint)
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")).close()
    return f"s3://{BUCKET}"


def _gcs() -> str:
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    os.environ["STORAGE_EMULATOR_HOST"] = endpoint
    os.environ["FSSPEC_GS"] = json.dumps({"token": "anon"})  # for subprocesses
    fsspec.config.conf["gs"] = {"token": "anon"}
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}"]
    _start([gcs_binary(), *address, "-backend", "memory"], f"{endpoint}/storage/v1/b?project=test")
    body = json.dumps({"name": BUCKET}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/storage/v1/b?project=test", body, headers)).close()
    return f"gs://{BUCKET}"


def gcs_binary() -> str:
    """Return the path of fake-gcs-server, built if necessary."""
    return find_fake_gcs() or str(build_go(GCS_MODULE, BUILT))


def build_go(module: str, binary: Path) -> Path:
    """Build a program with Go, unless another test process has done so; return its path."""
    binary.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(binary.with_suffix(".lock")):
        if not binary.exists():
            with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
                environment = {**os.environ, "GOBIN": folder, "GOFLAGS": "-modcacherw"}
                subprocess.run(["go", "install", module], env=environment, check=True)
                Path(folder, binary.name).replace(binary)  # atomic
    return binary


def free_port() -> int:
    """Return a free TCP port of loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(command: list[str], url: str) -> None:
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(_end, server, os.getpid())
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:  # it responds
            return
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{command[0]} does not respond at {url} (exit status {server.poll()})")


def _end(server: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() == owner:  # not in a fork of the test process
        server.terminate()
        server.wait(10)


class FileServer(http.server.ThreadingHTTPServer):
    """A web server of the bytes in `files`, by path, on a free port of this machine; a context manager.

    A path in `redirects` answers with that location. The query string is ignored.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _FileHandler)
        self.port = self.server_port
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.requests: list[str] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def url(self, path: str) -> str:
        """The URL of a path."""
        return f"http://127.0.0.1:{self.port}/{path}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _FileHandler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append(path)
        content = self.server.files.get(path)
        if path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[path])
            content = b""
        elif content is None:
            self.send_response(404)
            content = b""
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def _without(hidden: Sequence[str], listing: bytes) -> bytes:
    """Return a listing of S3 (XML) or GCS (JSON) without the names that contain one of `hidden`."""
    if listing.startswith(b"{"):
        page = json.loads(listing)
        page["items"] = [item for item in page.get("items", []) if not any(name in item["name"] for name in hidden)]
        return json.dumps(page).encode()
    entries = re.split(r"(<Contents>.*?</Contents>)", listing.decode(), flags=re.DOTALL)
    kept = [e for e in entries if not (e.startswith("<Contents>") and any(name in e for name in hidden))]
    return "".join(kept).encode()


class FaultyProxy(http.server.ThreadingHTTPServer):
    """Forwards requests to the server at `upstream`, with faults; a context manager, on a free port of this machine.

    `faults` are answers to the next requests whose method and path contain a text: (text, status, headers); the header
    "x-code" is S3's code of the error. Those of `always` are given to every such request. A body of a range is cut
    after `cut_after` bytes, or stays without its rest after `stall_after`; its length is said to be `claimed` bytes
    more. Listings leave out names that contain one of `hidden`. `before` is called with each request and its range.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.upstream = urllib.parse.urlsplit(upstream)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self._released = threading.Event()  # stalled responses end
        self.behave()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def behave(self) -> None:
        """Make no faults from now on."""
        self.faults: list[tuple[str, int, dict[str, str]]] = []
        self.always: list[tuple[str, int, dict[str, str]]] = []
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.claimed = 0
        self.hidden: tuple[str, ...] = ()
        self.before: Callable[[str, str], None] = lambda request, span: None
        self.requests.clear()
        self.sent = 0  # bytes of bodies of ranges

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def fault(self, request: str) -> tuple[str, int, dict[str, str]] | None:
        """The fault that answers a request, taken from `faults` if it is there."""
        for fault in self.faults:
            if fault[0] in request:
                self.faults.remove(fault)
                return fault
        return next((fault for fault in self.always if fault[0] in request), None)


class _ProxyHandler(http.server.BaseHTTPRequestHandler):
    server: FaultyProxy
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        proxy, request = self.server, f"{self.command} {self.path}"
        proxy.requests.append(request)
        proxy.before(request, self.headers.get("Range") or "")
        body = self._body()
        fault = proxy.fault(request)
        if fault is not None:
            code = fault[2].get("x-code", "AccessDenied" if fault[1] == 403 else "")
            xml = f"<Error><Code>{code}</Code><Message>no</Message></Error>" if code else ""
            self._send(fault[1], list(fault[2].items()), xml.encode())
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        headers = {name: value for name, value in headers.items() if name.lower() != "transfer-encoding"}
        upstream = http.client.HTTPConnection(proxy.upstream.netloc, timeout=30)
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        ignored = ("content-length", "transfer-encoding", "connection", "date", "server")
        kept = [(name, value) for name, value in response.getheaders() if name.lower() not in ignored]
        if proxy.hidden and re.search(r"/o\?|list-type=", self.path):
            content = _without(proxy.hidden, content)
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        self._send(response.status, kept, content, length)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        claimed = self.server.claimed if status == 206 else 0
        self.send_header("Content-Length", length or str(len(content) + claimed))
        self.end_headers()
        if self.command == "HEAD":
            return
        stalls = False
        if status == 206:
            cut, stall = self.server.cut_after, self.server.stall_after
            stalls = stall is not None and len(content) > stall
            content = content[:stall] if stalls else content[:cut]
            content = content[: len(content) + min(0, claimed)]
            self.close_connection = True
            self.server.sent += len(content)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)
            self.wfile.flush()
        if stalls:
            self.server._released.wait()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_: object) -> None:
        pass
