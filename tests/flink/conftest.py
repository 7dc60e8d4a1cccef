"""Fixtures of the tests on Flink: a cluster, a corpus, and the rows of an in-process run of it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers

sys.path.insert(0, str(Path(__file__).parents[2] / "deploy" / "flink"))

from cluster import Cluster
from known import Known, make_known
from tiny_generators import save_fusion

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    root = tmp_path_factory.mktemp("known")
    save_fusion(root / "fusion")
    return make_known(root)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start the servers of the stores before the workers, which find them by the environment."""
    for store in servers.STORES:
        servers.fresh_output(store, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def running(stores: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for all tests."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # so that the workers can import the traced stage
    cluster = Cluster(tmp_path_factory.mktemp("flink") / "cluster")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def flink(running: Cluster) -> Cluster:
    """The cluster, with processes restarted that an earlier test killed."""
    running.start()
    return running
