"""Beam's worker pool on one address; the pool that Beam starts by itself listens on all.

    python deploy/flink/worker_pool.py HOST:PORT

Whoever can connect to it can start processes. The image has a pool of its own: deploy/docker.
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import grpc  # type: ignore[import-untyped]
from apache_beam.portability.api import beam_fn_api_pb2_grpc
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer

START_SECONDS = 60  # a worker that ends within so long of its start is taken for one that had not begun,
TRIES = 3  # and is started so often


class WorkerPool(BeamFnExternalWorkerPoolServicer):  # type: ignore[misc]
    """Beam's pool, which starts a worker again that ends while it starts: Flink would wait for it for ever."""

    def StartWorker(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._start(request, TRIES)

    def _start(self, request: Any, tries: int) -> Any:
        answer = super().StartWorker(request, None)
        process = self._worker_processes.get(request.worker_id)
        if process is not None and tries > 1:
            Thread(target=self._watch, args=(request, process, tries - 1), daemon=True).start()
        return answer

    def _watch(self, request: Any, process: subprocess.Popen[bytes], tries: int) -> None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(START_SECONDS)
            time.sleep(1)  # whoever stops it may be about to forget it
            if self._worker_processes.get(request.worker_id) is process:
                self._start(request, tries)


def serve(address: str) -> None:
    """Start workers for whoever asks, for ever."""
    # A worker is started by the bare command `python`: it must be this one.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = grpc.server(ThreadPoolExecutor())
    servicer = WorkerPool(use_process=True, data_buffer_time_limit_ms=-1)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(servicer, server)
    if not server.add_insecure_port(address):
        sys.exit(f"cannot listen at {address}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    serve(sys.argv[1])
