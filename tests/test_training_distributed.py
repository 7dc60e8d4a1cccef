"""One training in several processes: real ones, two of them, over gloo on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from two_processes import SPLITS, WEIGHTS, Lopsided, differentiated, trainer

from mmbeam.cli import main
from mmbeam.corpus.write import write_corpus
from mmbeam.errors import RunMismatchError, UsageError
from mmbeam.features.captions import Captions
from mmbeam.features.dataset import rank_of, units_of_rank
from mmbeam.names import Modality
from mmbeam.readers.listing import list_shards
from mmbeam.training.distributed import ALONE, local_device, process_count
from mmbeam.training.examples import ExampleSource
from mmbeam.training.sources import CorpusSource, FeatureSource, Labelling, ShardSource
from mmbeam.types import Input, Needs, WorkUnit

TESTS = Path(__file__).parent
WAIT = 200.0  # seconds, for what takes ten where nothing else runs


# Who reads what


@given(st.integers(0, 50), st.integers(1, 9), st.randoms(use_true_random=False))
def test_each_unit_is_one_ranks_or_all_ranks(count: int, world_size: int, random: Any) -> None:
    order = random.sample(range(count), count)
    own, shared = zip(*(units_of_rank(order, rank, world_size) for rank in range(world_size)), strict=True)
    assert sorted([*(unit for units in own for unit in units), *shared[0]]) == list(range(count))
    assert all(units == shared[0] for units in shared)
    assert len({len(units) for units in own}) == 1
    assert len(shared[0]) < world_size
    assert all(list(units) == [unit for unit in order if unit in units] for units in own)


@given(st.text(), st.integers(1, 9))
def test_a_key_belongs_to_one_rank_whoever_asks(key: str, world_size: int) -> None:
    assert 0 <= rank_of(key, world_size) < world_size
    assert rank_of(key, world_size) == rank_of(key, world_size)


def test_keys_spread_over_the_ranks_whatever_part_they_are_of() -> None:
    labelling = Labelling(captions="caption", shares=(0.5, 0.25, 0.25))
    counts = Counter((labelling.part(str(n)), rank_of(str(n), 4)) for n in range(8000))
    assert all(0.9 < counts["train", rank] / 1000 < 1.1 for rank in range(4))
    assert [rank_of(str(n), 4) for n in range(8, 16)] == [3, 2, 2, 0, 0, 0, 3, 2]  # for ever: runs go on


def write_features(path: Path, rows: int = 50) -> Path:
    """Vectors that say which of three things is to be said."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, rows)
    names = np.array(["a cat.", "a dog.", "a bird in a tree."])
    vectors = {name: np.eye(8)[kinds] + 0.3 * rng.standard_normal((rows, 8)) for name in ("image", "text")}
    columns = {f"{name}_embedding": pa.array(list(of.astype(np.float32))) for name, of in vectors.items()}
    keys = [f"key-{row}" for row in range(rows)]
    table = pa.table({"key": keys, "caption": names[kinds].tolist(), **columns})
    dims = json.dumps(dict.fromkeys(columns, 8))
    pq.write_table(table.replace_schema_metadata({"mmbeam.dims": dims}), path, row_group_size=7)
    return path


def make_sources(directory: Path) -> dict[str, ExampleSource]:
    """A source of each kind, with few samples; of shards three units, one of which two ranks share."""
    write_corpus(directory, samples=60, shards=3, image_side=32, rate=8000)
    units = [WorkUnit(id=str(n), inputs=(Input(shard=s),)) for n, s in enumerate(list_shards([f"{directory}/*.tar"]))]
    labelling = Labelling(captions="caption", shares=(0.7, 0.15, 0.15))
    path = str(write_features(directory / "a.parquet"))
    text: frozenset[Modality] = frozenset(("text",))
    return {
        "shards": ShardSource(units=units, labelling=labelling, modalities=text, needs=Needs(modalities=text)),
        "features": FeatureSource(paths=[path], captions=Captions(column="caption"), labelling=labelling),
        "corpus": CorpusSource(seed=3, epoch_size=23, evaluation_size=5),
    }


@pytest.mark.parametrize("kind", ["shards", "features", "corpus"])
def test_ranks_read_each_training_sample_once_an_epoch_together(kind: str, tmp_path: Path) -> None:
    source = make_sources(tmp_path)[kind]
    for epoch in (0, 1):
        whole = sorted(each.key for each in source.examples("train", epoch))
        for world_size in (2, 3, 5):
            shares = [source.of_rank(rank, world_size) for rank in range(world_size)]
            keys = [[each.key for each in share.examples("train", epoch)] for share in shares]
            assert sorted(key for each in keys for key in each) == whole
            assert max(map(len, keys)) < len(whole)
    share = source.of_rank(1, 2)
    for part in ("validation", "test"):
        assert [each.key for each in share.examples(part)] == [each.key for each in source.examples(part)]
    assert share.count("train") == source.count("train")


# Two processes


def environment(**more: str) -> dict[str, str]:
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, **more}


def two_processes(*arguments: str) -> tuple[int, int]:
    """Run what torchrun would run, without torchrun, which ends the one when the other dies; how they ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *arguments]
    with ExitStack() as running:
        processes = []
        for rank in ("0", "1"):
            process = subprocess.Popen(command, env=environment(RANK=rank, LOCAL_RANK=rank, **both))
            processes.append(running.enter_context(process))
            running.callback(process.kill)  # before it is waited for
        first, second = (process.wait(WAIT) for process in processes)
    return first, second


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes found until one of them was killed, and the directory of their trainings."""
    directory = tmp_path_factory.mktemp("together")
    assert two_processes(str(TESTS / "two_processes.py"), str(directory)) == (0, -signal.SIGKILL)
    return directory, [json.loads((directory / f"{rank}.json").read_text()) for rank in (0, 1)]


Together = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("split", SPLITS)
def test_losses_and_gradients_are_those_of_one_process(split: str, together: Together) -> None:
    """With sources that one process has none of, negatives and groups over both, and a process without samples."""
    alone = differentiated(ALONE, (5,), WEIGHTS)
    assert set(alone["losses"]) == {"caption", *WEIGHTS, "sum"}
    for found in together[1]:
        assert found[split]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert set(found[split]["gradients"]) == set(alone["gradients"])
        for name, numbers in alone["gradients"].items():
            assert found[split]["gradients"][name] == pytest.approx(numbers, rel=1e-3, abs=1e-5), name


def test_the_generators_adversary_works_too(together: Together) -> None:
    """It judges texts drawn at random, of each process its own: so only that the gradients are the same in both."""
    first, second = (found["adversary"] for found in together[1])
    assert first == second
    assert 0 < first["losses"]["generator_adversary"] < 10
    assert all(np.isfinite(numbers).all() for numbers in first["gradients"].values())
    assert any(name.startswith("generator_adversary") for name in first["gradients"])


def test_each_row_is_learned_from_once_an_epoch_however_uneven_the_shares(together: Together) -> None:
    """Six rows and fifteen, four of each to a step: two steps of the four that an epoch has are of one process."""
    runs = [found["trained"] for found in together[1]]
    assert [len(run["keys"]) for run in runs] == [3 * 6, 3 * 15]
    whole = [each.key for epoch in range(3) for each in Lopsided().examples("train", epoch)]
    assert sorted(key for run in runs for key in run["keys"]) == sorted(whole)
    assert runs[0]["state"] == runs[1]["state"]
    assert (runs[0]["state"]["step"], runs[0]["state"]["samples"], runs[0]["steps"]) == (12, 63, 12)
    assert runs[0]["weights"] == runs[1]["weights"]


def test_it_goes_on_bit_for_bit_in_the_middle_of_an_epoch(together: Together) -> None:
    for found in together[1]:
        assert found["resumed"]["weights"] == found["trained"]["weights"]
        assert found["resumed"]["state"] == found["trained"]["state"]
        assert len(found["resumed"]["keys"]) < len(found["trained"]["keys"])


def test_another_number_of_processes_goes_on_between_epochs_alone(together: Together) -> None:
    directory, _ = together
    with pytest.raises(RunMismatchError, match="--nproc-per-node 2 to the end of an epoch"):
        trainer(Lopsided(), directory / "left").run()
    more = trainer(Lopsided(), directory / "trained", epochs=4)
    assert (more.run().samples, len(more.keys)) == (4 * 21, 21)


def test_when_one_is_killed_the_other_ends_and_any_number_goes_on_from_the_checkpoint(together: Together) -> None:
    directory, (first, second) = together
    assert "killed" not in second
    assert first["killed"].startswith("JobError: rank 0 of 2: another process is gone or hangs (")
    rest = trainer(Lopsided(), directory / "killed")
    assert (rest.run().epoch, rest.state.samples, len(rest.keys)) == (3, 3 * 21, 2 * 21)


def test_all_stop_together(together: Together) -> None:
    first, second = together[1]
    assert (first["early"], second["early"]) == (2, 2)
    for found in (first, second):  # at the same step, since the loss is that of both
        assert found["spoiled"].startswith(
            "TrainingError: step 2: expected a finite loss and gradient, found loss nan (align"
        )
    assert second["torn"] == "ShardError: torn.tar: ends in the middle of a member"
    assert first["torn"] == f"JobError: rank 1 stopped: {second['torn']}"
    assert first["not measured"].startswith("TrainingError: the validation part gave no samples")
    assert second["not measured"] == f"TrainingError: rank 0 stopped: {first['not measured']}"


def test_a_search_finds_the_same_in_both(together: Together) -> None:
    directory, (first, second) = together
    assert first["search"] == second["search"]
    trials = json.loads((directory / "search" / "search.json").read_text())
    assert [trial["error"] for trial in trials] == [None, None]


def test_a_batch_that_cannot_be_halved_is_refused(together: Together) -> None:
    for found in together[1]:
        assert found["odd"] == "UsageError: `batch_size` 9: 2 processes share each batch; expected a multiple of 2"


# The command


def epochs(output: Path) -> list[dict[str, Any]]:
    """What is written down of each epoch."""
    lines = [json.loads(line) for line in (output / "_training" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "epoch" in line]


def test_under_torchrun_the_command_reaches_what_it_reaches_alone(tmp_path: Path) -> None:
    """Every batch is the whole training part, so that one process and two learn from the same batches."""
    path = write_features(tmp_path / "a.parquet")
    argv = ["train", "--input", str(path), "--split", "0.6,0.2,0.2", "--hidden-size", "32", "--vocab-size", "280"]
    argv += ["--batch-size", "64", "--epochs", "20", "--patience", "0", "--dropout", "0", "--modality-dropout", "0"]
    argv += ["--device", "cpu", "--output"]
    assert main([*argv, str(tmp_path / "one")]) == 0

    two = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "mmbeam", *argv, str(two)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained: 20 steps") == 1
    alone, both = epochs(tmp_path / "one"), epochs(two)
    assert [line["epoch"] for line in both] == list(range(20))
    reports = [json.loads((each / "_training" / "report.json").read_text()) for each in (tmp_path / "one", two)]
    assert [report["processes"] for report in reports] == [1, 2]
    assert len({report["training"]["samples"] for report in reports}) == 1
    for one, other in zip(alone, both, strict=True):
        assert other["train"] == pytest.approx(one["train"], rel=2e-4), one["epoch"]
        assert other["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-5), one["epoch"]


# What the environment says


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_count() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start .* with torchrun"):
        process_count()


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert local_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="`device` cuda:1: each of 2 processes has a GPU of its own; expected cuda"):
        local_device("cuda:1")
