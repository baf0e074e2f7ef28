"""Where and how code runs: device, seeds, one deterministic thread for notebooks, loops spread over workers."""

from __future__ import annotations

import functools
import operator
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_kept = 0  # bytes of freed memory that this process was told to keep
NO_WORKER_SECONDS = 60  # a dask cluster may be without workers for this long: a lost one is replaced in seconds


def device(which: str = "auto"):
    """The ``torch.device`` to use: ``"auto"`` takes cuda, else mps, else cpu; any other name is taken as it is.

    Raises: ValueError where the device named is not available here.

    >>> device("cpu")
    device(type='cpu')
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [name for name, here in available.items() if here]
    try:
        chosen = torch.device(names[0] if which == "auto" else which)
        torch.empty(0, device=chosen)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {which!r} is not available here; there is {', '.join(names)}") from None
    return chosen


def processor() -> str:
    """The name of the processor, as the system gives it: to stand beside a measured time.

    >>> processor()
    'AMD EPYC 7B13'
    """
    info = Path("/proc/cpuinfo")  # Linux, where the platform module knows the architecture only
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seed_everything(seed: int = 0):
    """Seed Python, NumPy and torch (every device), and return a ``torch.Generator`` on the CPU with the same seed.

    For the first cell of a script or notebook. The functions of the kit take an explicit ``seed`` or ``generator``
    and leave these global states alone.

    Raises: ValueError for a seed outside 0 to 2**32 - 1, TypeError for one that is no int.
    """
    import numpy as np
    import torch

    seed = _checked_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def _checked_seed(seed: int) -> int:
    seed = operator.index(seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), not {seed}")
    return seed


def deterministic(seed: int = 0, threads: int = 1):
    """Make a notebook give the same numbers twice: seeds, deterministic kernels, a fixed number of threads.

    More threads split sums differently, so the last digits of a float32 result depend on their number. Freed memory
    stays with the process (:func:`keep_freed_memory`). Torch's remark that sparse tensors are in beta is left out.
    Returns the generator of :func:`seed_everything`.

    Raises: ValueError for fewer than one thread; and as :func:`seed_everything`.
    """
    import torch

    seed = _checked_seed(seed)  # before anything is changed
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this set
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(threads)
    # the same as use_deterministic_algorithms(True, warn_only=True), which also imports torch's compiler: 2 s
    torch.set_deterministic_debug_mode("warn")
    keep_freed_memory()
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
    return seed_everything(seed)


def keep_freed_memory(most: int = 2**29) -> bool:
    """Let the process keep up to ``most`` bytes of freed memory for its next tensors; whether that could be set.

    glibc hands freed tensors of some size back to the system, and taking them again costs a page fault every 4 kB:
    recording the activations of a forward then takes longer for the memory than for the copying. Only Linux with
    glibc has the setting. :func:`deterministic` calls this.

    >>> keep_freed_memory()
    True
    """
    import ctypes
    import sys

    global _kept
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_threshold, largest = -1, -3, 2**25  # names and limit of glibc's malloc.h
    done = mallopt is not None and bool(mallopt(trim_threshold, most)) and bool(mallopt(mmap_threshold, largest))
    _kept = most if done else _kept
    return done


def parallel(
    fn: Callable[[T], R], items: Iterable[T], *, n_jobs: int | None = None, desc: str | None = None
) -> list[R]:
    """``[fn(item) for item in items]``, in order, spread over joblib workers.

    ``n_jobs=None`` asks joblib: one job, or what the surrounding ``joblib.parallel_config`` says, so that

    >>> with joblib.parallel_config(backend="dask"):            # or "ray", "loky", "threading"
    ...     results = parallel(train_once, seeds)

    runs the same call on a cluster. Wherever a piece runs, it has the caller's number of torch threads, its choice of
    deterministic kernels and its :func:`keep_freed_memory`.
    ``desc`` shows a progress bar with that label. An exception in a piece stops the rest and is raised here.

    On dask the pieces of a worker that dies go to another one. Raises there: KilledWorker for a piece that took four
    workers with it (``distributed.scheduler.allowed-failures``), TimeoutError where no worker is left for a minute
    (or for the ``wait_for_workers_timeout`` of ``parallel_config``, if that is longer).
    """
    import joblib
    import torch
    from tqdm.auto import tqdm

    boxes = [_Box(item) for item in items]
    call = functools.partial(_call_as, fn, torch.get_num_threads(), torch.get_deterministic_debug_mode(), _kept)
    backend, _ = joblib.parallel.get_active_backend()
    with tqdm(total=len(boxes), desc=desc, disable=desc is None) as bar:
        if getattr(backend, "client", None) is not None:
            return _over_dask(backend, call, boxes, bar)
        work = (joblib.delayed(call)(box) for box in boxes)
        results = []
        for result in joblib.Parallel(n_jobs=n_jobs, return_as="generator")(work):
            results.append(result)
            bar.update()
        return results


class _Box:
    """Holds an item, so that dask, which looks into tuples and lists for work of its own, leaves it alone."""

    def __init__(self, item):
        self.item = item


def _call_as(fn: Callable[[T], R], threads: int, mode: int, kept: int, box: _Box) -> R:
    """A piece, run as the process runs that asked for it: threads, deterministic kernels, freed memory kept."""
    # A worker process starts with as many torch threads as the machine has cores: results would then depend on
    # where a piece ran, and the workers would fight over the cores.
    import torch

    if kept and kept != _kept:
        keep_freed_memory(kept)  # for good, as there is no way back
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    if before != (threads, mode):
        _set(threads, mode)
    try:
        return fn(box.item)
    finally:
        if before != (threads, mode):
            _set(*before)


def _set(threads: int, mode: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)


def _over_dask(backend, call: Callable[[_Box], R], boxes: list[_Box], bar) -> list[R]:
    """The pieces handed to dask's own client: joblib's loop waits for ever for a piece that dask has given up."""
    from distributed import as_completed

    backend.effective_n_jobs(-1)  # joblib's own error where no worker comes up
    with backend.retrieval_context():  # inside another piece: frees the thread that this one holds
        futures = backend.client.map(call, boxes, **{"pure": False, **backend.submit_kwargs})
        try:
            done = as_completed(futures, loop=backend.client.loop, with_results=True)
            found = {future.key: result for future, result in _watched(done, backend, bar)}
        except BaseException:
            backend.client.cancel(futures)
            raise
    return [found[future.key] for future in futures]


def _watched(done, backend, bar) -> Iterator[tuple[Any, Any]]:
    """(future, result) as they come in. Raises what a piece raised, TimeoutError where no worker is left."""
    patience = max(NO_WORKER_SECONDS, backend.wait_for_workers_timeout or 0)
    looked = seen = time.monotonic()
    while not done.is_empty():
        if done.has_ready():
            future, result = next(done)  # raises the exception of a failed piece
            if isinstance(result, CancelledError):
                raise result
            bar.update()
            yield future, result
        elif (now := time.monotonic()) < looked + 1:
            time.sleep(0.01)
        else:
            looked = now
            if backend.client.ncores():
                seen = now
            elif now > seen + patience:
                raise TimeoutError(f"no dask worker was left for {patience} s; what they wrote last says why")
