"""One training in two real processes, over gloo on loopback."""

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
from mmbeam.training.distributed import SINGLE, local_device, process_count
from mmbeam.training.examples import ExampleSource
from mmbeam.training.sources import CorpusSource, FeatureSource, Labelling, ShardSource
from mmbeam.types import Input, Needs, WorkUnit

TESTS = Path(__file__).parent
WAIT = 200.0  # seconds; ten on an idle machine


# Shards and keys of a rank


@given(st.integers(0, 50), st.integers(1, 9), st.randoms(use_true_random=False))
def test_every_unit_belongs_to_one_rank_or_is_shared_by_all(count: int, world_size: int, random: Any) -> None:
    order = random.sample(range(count), count)
    exclusive, shared = zip(*(units_of_rank(order, rank, world_size) for rank in range(world_size)), strict=True)
    assert sorted([*(unit for units in exclusive for unit in units), *shared[0]]) == list(range(count))
    assert all(units == shared[0] for units in shared)
    assert len({len(units) for units in exclusive}) == 1
    assert len(shared[0]) < world_size
    assert all(list(units) == [unit for unit in order if unit in units] for units in exclusive)


def test_keys_of_a_split_spread_evenly_over_the_ranks() -> None:
    labelling = Labelling(captions="caption", split_fractions=(0.5, 0.25, 0.25))
    counts = Counter((labelling.split(str(n)), rank_of(str(n), 4)) for n in range(8000))
    assert all(0.9 < counts["train", rank] / 1000 < 1.1 for rank in range(4))
    assert [rank_of(str(n), 4) for n in range(8, 16)] == [3, 2, 2, 0, 0, 0, 3, 2]  # fixed, so that runs can resume


def write_features(path: Path, rows: int = 50) -> Path:
    """Write vectors of three classes, with a caption per class."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, rows)
    names = np.array(["a cat.", "a dog.", "a bird in a tree."])
    vectors = {name: np.eye(8)[kinds] + 0.3 * rng.standard_normal((rows, 8)) for name in ("image", "text")}
    columns = {f"{name}_embedding": pa.array(list(matrix.astype(np.float32))) for name, matrix in vectors.items()}
    keys = [f"key-{row}" for row in range(rows)]
    table = pa.table({"key": keys, "caption": names[kinds].tolist(), **columns})
    dims = json.dumps(dict.fromkeys(columns, 8))
    pq.write_table(table.replace_schema_metadata({"mmbeam.dims": dims}), path, row_group_size=7)
    return path


def make_sources(directory: Path) -> dict[str, ExampleSource]:
    """Return a small source of every kind; the shards are three units, of which two ranks share one."""
    write_corpus(directory, samples=60, shards=3, image_side=32, rate=8000)
    units = [WorkUnit(id=str(n), inputs=(Input(shard=s),)) for n, s in enumerate(list_shards([f"{directory}/*.tar"]))]
    labelling = Labelling(captions="caption", split_fractions=(0.7, 0.15, 0.15))
    path = str(write_features(directory / "a.parquet"))
    text: frozenset[Modality] = frozenset(("text",))
    return {
        "shards": ShardSource(units=units, labelling=labelling, modalities=text, needs=Needs(modalities=text)),
        "features": FeatureSource(paths=[path], captions=Captions(column="caption"), labelling=labelling),
        "corpus": CorpusSource(seed=3, epoch_size=23, evaluation_size=5),
    }


@pytest.mark.parametrize("kind", ["shards", "features", "corpus"])
def test_the_ranks_together_read_every_training_sample_once_an_epoch(kind: str, tmp_path: Path) -> None:
    source = make_sources(tmp_path)[kind]
    for epoch in (0, 1):
        whole = sorted(example.key for example in source.examples("train", epoch))
        for world_size in (2, 3, 5):
            shares = [source.of_rank(rank, world_size) for rank in range(world_size)]
            keys = [[example.key for example in share.examples("train", epoch)] for share in shares]
            assert sorted(key for share_keys in keys for key in share_keys) == whole
            assert max(map(len, keys)) < len(whole)
    share = source.of_rank(1, 2)
    for part in ("validation", "test"):
        keys_of_rank, all_keys = ([example.key for example in s.examples(part)] for s in (share, source))
        assert keys_of_rank == all_keys
    assert share.count("train") == source.count("train")


# Two processes


def environment(**more: str) -> dict[str, str]:
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, **more}


def two_processes(*arguments: str) -> tuple[int, int]:
    """Run two ranks without torchrun, which would end one when the other dies; return their exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *arguments]
    with ExitStack() as running:
        processes = []
        for rank in ("0", "1"):
            process = subprocess.Popen(command, env=environment(RANK=rank, LOCAL_RANK=rank, **both))
            processes.append(running.enter_context(process))
            running.callback(process.kill)  # runs before the wait
        first, second = (process.wait(WAIT) for process in processes)
    return first, second


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of the trainings in two processes, and their results up to the kill of rank 1."""
    directory = tmp_path_factory.mktemp("together")
    assert two_processes(str(TESTS / "two_processes.py"), str(directory)) == (0, -signal.SIGKILL)
    return directory, [json.loads((directory / f"{rank}.json").read_text()) for rank in (0, 1)]


Together = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("split", SPLITS)
def test_losses_and_gradients_equal_those_of_one_process(split: str, together: Together) -> None:
    """Some sources are in one process only, negatives and groups span both, and one process may have no samples."""
    alone = differentiated(SINGLE, (5,), WEIGHTS)
    assert set(alone["losses"]) == {"caption", *WEIGHTS, "sum"}
    for results in together[1]:
        assert results[split]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert set(results[split]["gradients"]) == set(alone["gradients"])
        for name, numbers in alone["gradients"].items():
            assert results[split]["gradients"][name] == pytest.approx(numbers, rel=1e-3, abs=1e-5), name


def test_the_generator_adversary_has_the_same_gradients_in_both_processes(together: Together) -> None:
    """It samples different texts in every process, so they differ from those of one process."""
    first, second = (results["adversary"] for results in together[1])
    assert first == second
    assert 0 < first["losses"]["generator_adversary"] < 10
    assert all(np.isfinite(numbers).all() for numbers in first["gradients"].values())
    assert any(name.startswith("generator_adversary") for name in first["gradients"])


def test_every_row_is_used_once_an_epoch_with_uneven_shares(together: Together) -> None:
    """Rank 0 has 6 rows and rank 1 has 15, at 4 a step: rank 0 has no rows in two of the four steps of an epoch."""
    runs = [results["trained"] for results in together[1]]
    assert [len(run["keys"]) for run in runs] == [3 * 6, 3 * 15]
    whole = [example.key for epoch in range(3) for example in Lopsided().examples("train", epoch)]
    assert sorted(key for run in runs for key in run["keys"]) == sorted(whole)
    assert runs[0]["state"] == runs[1]["state"]
    assert (runs[0]["state"]["step"], runs[0]["state"]["samples"], runs[0]["steps"]) == (12, 63, 12)
    assert runs[0]["weights"] == runs[1]["weights"]


def test_a_training_resumes_bit_for_bit_within_an_epoch(together: Together) -> None:
    for results in together[1]:
        assert results["resumed"]["weights"] == results["trained"]["weights"]
        assert results["resumed"]["state"] == results["trained"]["state"]
        assert len(results["resumed"]["keys"]) < len(results["trained"]["keys"])


def test_another_number_of_processes_resumes_only_at_the_end_of_an_epoch(together: Together) -> None:
    directory, _ = together
    with pytest.raises(RunMismatchError, match="--nproc-per-node 2 to the end of the epoch"):
        trainer(Lopsided(), directory / "left").run()
    more = trainer(Lopsided(), directory / "trained", epochs=4)
    assert (more.run().samples, len(more.keys)) == (4 * 21, 21)


def test_a_killed_process_ends_the_other_and_one_process_resumes_from_the_checkpoint(together: Together) -> None:
    directory, (first, second) = together
    assert "killed" not in second
    assert first["killed"].startswith("JobError: rank 0 of 2: another process died or hangs (")
    rest = trainer(Lopsided(), directory / "killed")
    assert (rest.run().epoch, rest.state.samples, len(rest.keys)) == (3, 3 * 21, 2 * 21)


def test_both_processes_stop_at_the_same_step(together: Together) -> None:
    first, second = together[1]
    assert (first["early"], second["early"]) == (2, 2)
    for results in (first, second):
        assert results["spoiled"].startswith(
            "TrainingError: step 2: expected a finite loss and gradient, found loss nan (align"
        )
    assert second["truncated"] == "ShardError: truncated.tar: ends in the middle of a member"
    assert first["truncated"] == f"JobError: rank 1 stopped: {second['truncated']}"
    assert first["no validation"].startswith("TrainingError: the validation split has no usable samples")
    assert second["no validation"] == f"TrainingError: rank 0 stopped: {first['no validation']}"


def test_a_search_chooses_the_same_in_both_processes(together: Together) -> None:
    directory, (first, second) = together
    assert first["search"] == second["search"]
    trials = json.loads((directory / "search" / "search.json").read_text())
    assert [trial["error"] for trial in trials] == [None, None]


def test_an_odd_batch_size_is_rejected(together: Together) -> None:
    for results in together[1]:
        assert results["odd"] == "UsageError: `batch_size` 9: 2 processes share each batch; expected a multiple of 2"


# The command


def epochs(output: Path) -> list[dict[str, Any]]:
    """Return the lines of the epochs in the metrics file."""
    lines = [json.loads(line) for line in (output / "_training" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "epoch" in line]


def test_training_under_torchrun_equals_training_in_one_process(tmp_path: Path) -> None:
    """Every batch is the whole training split, so that one process and two learn from the same batches."""
    path = write_features(tmp_path / "a.parquet")
    argv = ["train", "--input", str(path), "--split", "0.6,0.2,0.2", "--hidden-size", "32", "--vocab-size", "280"]
    argv += ["--batch-size", "64", "--epochs", "8", "--patience", "0", "--dropout", "0", "--modality-dropout", "0"]
    argv += ["--device", "cpu", "--output"]
    assert main([*argv, str(tmp_path / "one")]) == 0

    two = tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "mmbeam", *argv, str(two)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained: 8 steps") == 1
    alone, both = epochs(tmp_path / "one"), epochs(two)
    assert [line["epoch"] for line in both] == list(range(8))
    reports = [json.loads((output / "_training" / "report.json").read_text()) for output in (tmp_path / "one", two)]
    assert [report["processes"] for report in reports] == [1, 2]
    assert len({report["training"]["samples"] for report in reports}) == 1
    for single, double in zip(alone, both, strict=True):
        assert double["train"] == pytest.approx(single["train"], rel=2e-4), single["epoch"]
        loss = single["validation"]["loss"]
        assert double["validation"]["loss"] == pytest.approx(loss, rel=1e-5), single["epoch"]


# The environment


def test_the_process_count_is_1_without_torchrun_and_an_incomplete_environment_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert process_count() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match=r"LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; start .* with torchrun"):
        process_count()


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert local_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="cuda:1: expected cuda, auto or cpu, because each of 2 processes needs a GPU"):
        local_device("cuda:1")
