"""Devices, seeds and loops over workers; and what ``import nbkit`` costs."""

from __future__ import annotations

import random
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch

from nbkit import runtime


def test_auto_finds_a_device_and_a_missing_one_is_named():
    assert runtime.device("auto").type in ("cuda", "mps", "cpu")
    assert runtime.device("cpu") == torch.device("cpu")
    for missing in ("gpu", "xpu", None, *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(ValueError, match=f"{missing!r} is not available here; there is .*cpu"):
            runtime.device(missing)


def test_the_processor_has_a_name_with_and_without_proc(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(runtime, "Path", lambda _: info)
    assert runtime.processor()  # whatever this system says of itself
    info.write_text("processor: 0\nmodel name\t: A: B 7\nprocessor: 1\nmodel name\t: A: B 7\n")
    assert runtime.processor() == "A: B 7"


def test_a_seed_fixes_python_numpy_and_torch():
    def draw():
        generator = runtime.seed_everything(7)
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item()

    assert draw() == draw()
    assert torch.equal(runtime.seed_everything(np.int64(3)).get_state(), runtime.seed_everything(3).get_state())


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (2**32, ValueError), (1.5, TypeError)])
def test_a_bad_seed_changes_nothing(seed, error):
    before, threads = random.getstate(), torch.get_num_threads()
    for call in (lambda: runtime.seed_everything(seed), lambda: runtime.deterministic(seed, threads=threads + 1)):
        with pytest.raises(error):
            call()
        assert random.getstate() == before and torch.get_num_threads() == threads


def test_deterministic_means_deterministic_kernels_without_loading_the_compiler():
    code = (
        "import sys, torch; from nbkit import runtime; runtime.deterministic(); "
        "assert torch.are_deterministic_algorithms_enabled() and 'torch._inductor' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _threads_and_square(x):
    return torch.get_num_threads(), x * x


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_parallel_keeps_order_and_the_callers_threads(backend):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):  # a worker's own number is one of them at most
            torch.set_num_threads(threads)
            with joblib.parallel_config(backend=backend, n_jobs=2):
                results = runtime.parallel(_threads_and_square, range(5))
            assert results == [(threads, x * x) for x in range(5)]
    finally:
        torch.set_num_threads(before)


def test_an_exception_in_a_piece_is_raised():
    with pytest.raises(ZeroDivisionError):
        runtime.parallel(lambda x: 1 / x, [1, 0])


def test_threads_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        runtime.deterministic(threads=0)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_stays_and_is_given_back_on_request():
    code = """
import ctypes, psutil, torch
from nbkit import runtime
assert runtime.keep_freed_memory()
rss = lambda: psutil.Process().memory_info().rss / 2**20
parts = [torch.ones(2**20) for _ in range(40)]                     # 40 tensors of 4 MB
full = rss()
del parts
kept = rss()
ctypes.CDLL(None).malloc_trim(0)
print(int(full - kept), int(kept - rss()))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    released, given_back = map(int, out.split())
    assert released < 20 and given_back > 140


def test_importing_nbkit_imports_neither_torch_nor_pyplot_nor_shap():
    code = "import nbkit, sys; print([m for m in ('torch', 'matplotlib.pyplot', 'shap', 'pandas') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_unknown_submodule_is_an_attribute_error():
    import nbkit

    with pytest.raises(AttributeError, match="it has"):
        nbkit.nothing  # noqa: B018
    assert "sparsity" in dir(nbkit)
