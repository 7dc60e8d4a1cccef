"""Beam's own servers as processes of this machine: worker pool, job service, Prism."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import apache_beam
from servers import build_go

BUILT = Path(__file__).parent.parent / ".cache" / "bin" / "prism"
PRISM_MODULE = f"github.com/apache/beam/sdks/v2/go/cmd/prism@v{apache_beam.__version__}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """A Beam server as a process group of its own; it starts workers by the command `python`."""

    def __init__(self, module: str, *arguments: str, port: int) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.port = port

    def __enter__(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"no server at {self.port}")

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def prism_binary() -> str | None:
    """Beam's Prism: named by MMBEAM_PRISM, or built once by Go into .cache/bin; None where there is no Go."""
    named = os.environ.get("MMBEAM_PRISM")
    if named or BUILT.exists():
        return named or str(BUILT)
    if shutil.which("go") is None:
        return None
    return str(build_go(PRISM_MODULE, BUILT))
