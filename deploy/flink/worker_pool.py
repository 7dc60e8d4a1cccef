"""Beam's worker pool, listening on a single address. Beam's own command listens on all addresses.

    python deploy/flink/worker_pool.py HOST:PORT

Clients that can connect to the pool can start processes. The image of deploy/docker contains it.
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

START_SECONDS = 60  # a worker that ends earlier counts as not started
ATTEMPTS = 3  # attempts to start a worker


class WorkerPool(BeamFnExternalWorkerPoolServicer):  # type: ignore[misc]
    """Beam's pool, which also restarts a worker that ends during its start: Flink would wait for it forever."""

    def StartWorker(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._start(request, ATTEMPTS)

    def _start(self, request: Any, attempts: int) -> Any:
        answer = super().StartWorker(request, None)
        process = self._worker_processes.get(request.worker_id)
        if process is not None and attempts > 1:
            Thread(target=self._watch, args=(request, process, attempts - 1), daemon=True).start()
        return answer

    def _watch(self, request: Any, process: subprocess.Popen[bytes], attempts: int) -> None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(START_SECONDS)
            time.sleep(1)  # another thread may have stopped it, and may be about to remove it
            if self._worker_processes.get(request.worker_id) is process:
                self._start(request, attempts)


def serve(address: str) -> None:
    """Listen at `address` and start workers on request, forever."""
    # Beam starts a worker with the command `python`, which must be this interpreter.
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
