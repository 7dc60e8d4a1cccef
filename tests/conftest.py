"""Environment, devices and tiny models shared by all tests."""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from known import Known

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test uses the network
# Before torch is imported: the kernels of a tiny model are too short for threads, which wait for each other in a loop.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import servers
import torch

# CI draws the same examples each time; local runs keep searching.
hypothesis.settings.register_profile("local", max_examples=40)
hypothesis.settings.register_profile("ci", max_examples=40, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device of this machine; the test runs once per device."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny CLIP."""
    from tiny_clip import save_clip

    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def clap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny CLAP."""
    from tiny_audio_text import save_clap

    return save_clap(tmp_path_factory.mktemp("models") / "clap")


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> "Known":
    """A corpus of five shards, and the rows of an in-process run of it."""
    from known import make_known

    return make_known(tmp_path_factory.mktemp("known"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build missing servers before the processes of pytest-xdist start: a build takes longer than a test may."""
    if getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput"):
        from beam_servers import prism_binary

        prism_binary()
        if "gcs" in servers.STORES:
            servers.gcs_binary()


def pytest_report_header() -> str:
    """Name the stores that are tested on this machine, and why one is not."""
    return servers.report_header()


TORTURE = {  # what the tests of a file do to a run
    "test_conservation": "damaged input",
    "test_tarheaders": "cut and changed headers",
    "test_hostile": "hostile input",
    "test_memory": "input that takes memory",
    "test_storage": "faults of storage",
    "test_death": "death of a process, full disks, damaged outputs",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases of each kind of damage were tried, and how many were held."""
    tried, held = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            kind = TORTURE.get(Path(report.location[0]).stem)
            if kind is not None and report.when == "call":
                tried[kind] += 1
                held[kind] += outcome == "passed"
    for kind, count in tried.items():
        terminalreporter.write_line(f"{kind}: {held[kind]} of {count} cases held")
    if terminalreporter.config.get_verbosity() > 0:
        for report in terminalreporter.getreports("passed"):
            for name, counts in report.user_properties:
                if name == "device" and report.when == "call":
                    terminalreporter.write_line(f"a window on a GPU: {counts}")
