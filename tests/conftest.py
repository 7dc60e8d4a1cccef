"""What all tests share."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test looks at the network

import hypothesis
import servers
import torch

# A machine that checks a change draws the same examples each time; a person's runs go on searching.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine: one test body for all."""
    return torch.device(request.param)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Of a run in several processes: build the servers that are not there yet, which takes longer than a test may."""
    if getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput"):
        from beam_servers import prism_binary

        prism_binary()
        if "gcs" in servers.STORES:
            servers.gcs_binary()


def pytest_report_header() -> str:
    """Which stores are tested on this machine, and why one is not."""
    return servers.report_header()
