"""Beam's servers as processes on loopback: worker pool, job service, Prism."""

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


class Server:
    """A Beam server in another process group; it starts workers by the command `python`."""

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
    """Return the path of Prism: from MMBEAM_PRISM, or built by Go into .cache/bin; None without Go."""
    configured = os.environ.get("MMBEAM_PRISM")
    if configured or BUILT.exists():
        return configured or str(BUILT)
    if shutil.which("go") is None:
        return None
    return str(build_go(PRISM_MODULE, BUILT))
