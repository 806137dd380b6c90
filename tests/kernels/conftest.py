"""Compiled kernels, run where mistakes show: scratch full of NaN, and nothing but NaN around every array."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fences import fence

from mctune.backends.protocol import Kernel
from mctune.backends.tvm import TvmBackend
from mctune.backends.tvm.templates import OPERATIONS
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.runtime.kernels.tvm import loader as tvm_loader
from tests.draw import Wanted, host, plain

SCRATCH = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
enum { GUARD = 64 };
static int overruns, callers, period = 1;
static _Thread_local int counted;
int mctune_test_overruns(void) { return overruns; }
int mctune_test_callers(void) { /* threads that asked for memory since the last call of this */
  int seen = callers;
  return callers = 0, ++period, seen;
}
void *mctune_test_alloc(int device, int id, uint64_t bytes, int code, int bits) {
  if (counted != period) counted = period, __atomic_fetch_add(&callers, 1, __ATOMIC_SEQ_CST);
  char *block = aligned_alloc(GUARD, (bytes + 3 * GUARD - 1) / GUARD * GUARD);
  if (block == NULL) return NULL;
  memset(block, 0xff, bytes + 2 * GUARD);
  *(uint64_t *)block = bytes;
  return block + GUARD;
}
int mctune_test_free(int device, int id, void *scratch) {
  unsigned char *block = (unsigned char *)scratch - GUARD, *after;
  after = block + GUARD + *(uint64_t *)block;
  for (int i = sizeof(uint64_t); i < GUARD; ++i)
    if (block[i] != 0xff || after[i] != 0xff) __atomic_store_n(&overruns, 1, __ATOMIC_SEQ_CST);
  free(block);
  return 0;
}
"""
"""Scratch memory for kernels: all bits set (NaN) when it is handed out, and a fence on both sides."""


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """Kernels that are loaded from now on get the scratch memory above."""
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "scratch.c").write_text(SCRATCH)
    command = ["gcc", "-O2", "-shared", "-fPIC", "scratch.c", "-o", "scratch.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "scratch.so"))
    ours = {"__TVMBackendAllocWorkspace": "mctune_test_alloc", "__TVMBackendFreeWorkspace": "mctune_test_free"}
    pointers = {symbol: ctypes.cast(getattr(library, name), ctypes.c_void_p) for symbol, name in ours.items()}
    functions = tvm_loader._host_functions()
    assert set(pointers) < set(functions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tvm_loader, "_host_functions", lambda: functions | pointers)
        yield library


@pytest.fixture(scope="session")
def build(kernel_folder: Path, scratch: ctypes.CDLL) -> Callable[..., Kernel]:
    """The launcher of a kernel of any pass, compiled once, with all of its functions fenced in."""

    def build(
        problem: Problem, config: Config | None = None, target: Target | None = None, *, fenced: bool = True
    ) -> Kernel:
        backend = TvmBackend()
        config = config or plain(problem)
        kernel = backend.load(problem, config, backend.build(problem, config, target or host(), kernel_folder))
        if fenced:
            if hasattr(kernel, "module"):
                kernel.module = _Fenced(kernel.module)
            else:
                for name in OPERATIONS[problem.writes.family, problem.pass_]:
                    # None is an operation that the configuration fuses into another.
                    setattr(kernel, name, getattr(kernel, name) and fence(getattr(kernel, name)))
        return kernel

    return build


class _Fenced:
    """A library whose functions are fenced in."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Callable[..., None]:
        return fence(self.module[name])


def pytest_make_parametrize_id(val: object) -> str | None:
    return str(val) if isinstance(val, Wanted) else None
