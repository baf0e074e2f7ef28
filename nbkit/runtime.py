"""Where and how code runs: device, seeds, one deterministic thread for notebooks, loops spread over workers."""

from __future__ import annotations

import operator
import os
import platform
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
    stays with the process (:func:`keep_freed_memory`). Returns the generator of :func:`seed_everything`.

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

    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_threshold, largest = -1, -3, 2**25  # names and limit of glibc's malloc.h
    return mallopt is not None and bool(mallopt(trim_threshold, most)) and bool(mallopt(mmap_threshold, largest))


def _call_on_threads(fn: Callable[[T], R], threads: int, boxed: tuple[T]) -> R:
    # A worker process starts with as many torch threads as the machine has cores: results would then depend on
    # where a piece ran, and the workers would fight over the cores.
    import torch

    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        return fn(*boxed)
    finally:
        if before != threads:
            torch.set_num_threads(before)


def parallel(
    fn: Callable[[T], R], items: Iterable[T], *, n_jobs: int | None = None, desc: str | None = None
) -> list[R]:
    """``[fn(item) for item in items]``, in order, spread over joblib workers.

    ``n_jobs=None`` asks joblib: one job, or what the surrounding ``joblib.parallel_config`` says, so that

    >>> with joblib.parallel_config(backend="dask"):            # or "ray", "loky", "threading"
    ...     results = parallel(train_once, seeds)

    runs the same call on a cluster. Each piece runs on as many torch threads as the caller has, wherever it runs.
    ``desc`` shows a progress bar with that label. An exception in a piece stops the rest and is raised here.
    """
    import functools

    import joblib
    import torch
    from tqdm.auto import tqdm

    items = list(items)
    call: Callable[[Any], R] = functools.partial(_call_on_threads, fn, torch.get_num_threads())
    # Boxed, because joblib's dask backend places a bare array on one worker alone, and the sweep dies with that worker.
    work = (joblib.delayed(call)((item,)) for item in items)
    results = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(work)
    return list(tqdm(results, total=len(items), desc=desc, disable=desc is None))
