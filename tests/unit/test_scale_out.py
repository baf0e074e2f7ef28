"""A sweep as in ``00-start/06-scale-out`` on two worker processes: the result of one, whether a worker dies or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch

from nbkit import models, runtime, sparsity, training

pytest.importorskip("distributed", reason="needs dask: pip install -e '.[scale]'")

pytestmark = pytest.mark.slow
ITEMS = [(seed, level) for seed in range(3) for level in (0.0, 0.5, 0.8, 0.95)]
SECONDS = 30  # what a sweep may take before a test gives up; its pieces are done in two


def train_and_prune(item) -> dict[str, float]:
    """One piece: a network trained from its seed, pruned to its sparsity, measured. Nothing else decides the result."""
    seed, level = int(item[0]), float(item[1])
    x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
    y = x[:, :5].argmax(1)
    model = models.build("lenet-300-100", seed=seed, inputs=64, hidden=(32,), classes=5)
    training.fit(model, (x[:400], y[:400]), steps=30, lr=1e-2, batch=64, seed=seed)
    sparsity.magnitude_mask(model, level).apply(model, keep_original=False)
    loss, accuracy = training.evaluate(model, x[400:], y[400:])
    return {"seed": seed, "sparsity": level, "loss": loss, "accuracy": accuracy}


class Traced:
    """``train_and_prune`` that leaves a file as a piece starts and one when it is done, named ``<piece>-<process>``.

    The piece ``stuck`` does not end in the first process that takes it up.
    """

    def __init__(self, folder: Path, stuck: int | None = None):
        self.folder, self.stuck = folder, stuck

    def __call__(self, item):
        piece = ITEMS.index((item[0], item[1]))
        first = not self.names("started", piece)
        (self.folder / f"{piece}-{os.getpid()}.started").touch()
        if piece == self.stuck and first:
            time.sleep(2 * SECONDS)
        result = train_and_prune(item)
        (self.folder / f"{piece}-{os.getpid()}.done").touch()
        return result

    def names(self, state: str, piece: int | str = "*") -> list[str]:
        return [path.stem for path in self.folder.glob(f"{piece}-*.{state}")]


@pytest.fixture(scope="module")
def cluster():
    from dask.distributed import Client, LocalCluster

    options = {"threads_per_worker": 1, "dashboard_address": None, "silence_logs": 50}
    with LocalCluster(n_workers=2, processes=True, **options) as cluster, Client(cluster) as client:
        client.run(train_and_prune, ITEMS[0])  # importing torch takes longer than a sweep
        yield client


@pytest.fixture(scope="module")
def plain():
    return [train_and_prune(item) for item in ITEMS]


def in_background(fn, items, **config) -> tuple[threading.Thread, list]:
    """A sweep on the cluster in a thread of its own, for a test to give up on; its result or the exception."""
    outcome: list = []

    def sweep():
        try:
            with joblib.parallel_config(backend="dask", **config):
                outcome.append(runtime.parallel(fn, items))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    return thread, outcome


def kill_the_stuck_worker(trace: Traced, thread: threading.Thread) -> str:
    """Kill the process that is in the middle of the stuck piece, by its pid; the piece and the process."""
    end = time.monotonic() + SECONDS
    while thread.is_alive() and time.monotonic() < end:
        for name in trace.names("started", trace.stuck):
            os.kill(int(name.partition("-")[2]), signal.SIGKILL)
            return name
        time.sleep(0.01)
    pytest.fail("the sweep ended, or stood still, before a worker could be killed")


def test_two_processes_return_what_one_returns(cluster, plain, tmp_path):
    trace = Traced(tmp_path)
    thread, outcome = in_background(trace, ITEMS)
    thread.join(SECONDS)
    assert outcome == [plain]
    workers = {int(name.partition("-")[2]) for name in trace.names("done")}
    assert workers == set(cluster.run(os.getpid).values())
    assert len(workers) == 2 and os.getpid() not in workers


def test_items_come_back_as_they_went_in(cluster):
    # dask reads a tuple that starts with a function as a call, and lists and dicts as places to look for more
    items = [(len, "abc"), [len, "abc"], {"a": (len, "abc")}, None]
    with joblib.parallel_config(backend="dask"):
        assert runtime.parallel(lambda item: item, items) == items
        assert runtime.parallel(len, []) == []


def test_every_piece_runs_on_the_callers_threads(cluster):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with joblib.parallel_config(backend="dask"):
                assert runtime.parallel(lambda _: torch.get_num_threads(), range(4)) == [threads] * 4
    finally:
        torch.set_num_threads(before)


def test_a_piece_is_as_deterministic_as_its_caller(cluster):
    with joblib.parallel_config(backend="dask"):
        for mode in (1, 0):
            torch.set_deterministic_debug_mode(mode)
            assert runtime.parallel(lambda _: torch.get_deterministic_debug_mode(), range(2)) == [mode] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_worker_keeps_freed_memory_as_its_caller_does(cluster):
    def page_faults(_):
        import resource

        torch.ones(2**20)  # 4 MB, 1,000 pages
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            torch.ones(2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert runtime.keep_freed_memory()
    with joblib.parallel_config(backend="dask"):
        assert max(runtime.parallel(page_faults, range(4))) < 5000


def test_the_bar_counts_the_pieces(cluster, capsys):
    with joblib.parallel_config(backend="dask"):
        runtime.parallel(len, ["a", "b", "c"], desc="words")
    assert "words: 100%" in (err := capsys.readouterr().err) and "3/3" in err


def test_an_exception_in_a_piece_is_raised_here(cluster):
    refused = pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)")
    with joblib.parallel_config(backend="dask"), refused:
        runtime.parallel(train_and_prune, [(0, 0.5), (0, 1.5)])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_nothing_is_lost_when_a_worker_is_killed_half_way(cluster, plain, tmp_path):
    # arrays, which joblib would place on one worker if it saw them: they must not die with it
    items = [np.concatenate([item, np.zeros(1000)]) for item in ITEMS]
    trace = Traced(tmp_path, stuck=len(ITEMS) // 2)
    thread, outcome = in_background(trace, items)
    killed = kill_the_stuck_worker(trace, thread)
    thread.join(SECONDS)
    assert outcome == [plain]
    assert [name for name in trace.names("done", trace.stuck) if name != killed], "no other process did its piece"


def test_a_piece_that_kills_every_worker_raises(cluster):
    from distributed.scheduler import KilledWorker

    thread, outcome = in_background(lambda item: os._exit(1) if item == 2 else item, range(5))
    thread.join(2 * SECONDS)
    assert [type(error) for error in outcome] == [KilledWorker]
    with joblib.parallel_config(backend="dask", wait_for_workers_timeout=SECONDS):  # the nannies start new ones
        assert runtime.parallel(len, ["a", "bc"]) == [1, 2]


def test_a_sweep_that_no_worker_is_left_for_raises(monkeypatch):
    from dask.distributed import Client, LocalCluster

    monkeypatch.setattr(runtime, "NO_WORKER_SECONDS", 2)
    with LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=50) as empty, Client(empty) as client:
        command = [sys.executable, "-m", "distributed.cli.dask_worker", empty.scheduler_address]
        command += ["--no-nanny", "--no-dashboard", "--nthreads", "1"]  # no nanny: nobody starts it again
        with subprocess.Popen(command, stderr=subprocess.DEVNULL):
            client.wait_for_workers(1, timeout=SECONDS)
            thread, outcome = in_background(lambda item: os._exit(1), range(3), wait_for_workers_timeout=1)
            thread.join(2 * SECONDS)
    assert [type(error) for error in outcome] == [TimeoutError]
    assert "no dask worker was left" in str(outcome[0])
