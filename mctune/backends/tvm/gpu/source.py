"""CUDA C from TVM's functions: one source a module, with next to nothing before it, that NVRTC compiles alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PREAMBLE = """\
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
"""
"""Instead of TVM's, which includes CUDA's headers: 16-bit floats are kept as bits, so that none is needed."""
_END_OF_TVMS = "#define ushort unsigned short\n#endif\n"
_DECLARED = re.compile(r'^extern "C" __global__ void .*?\b(\w+)\(([^)]*)\);\n', re.MULTILINE)
_DEFINED = re.compile(r'^extern "C" __global__ void .*?\b(\w+)\(([^)]*)\) \{$', re.MULTILINE)
_NOALIAS = "tirx.noalias"
_GRID = re.compile(r", int grid_[xyz]\b")
_THREADS = re.compile(r"__launch_bounds__\((\d+)\)")


@dataclass(frozen=True)
class Entry:
    """A kernel of a source: its symbol, its parameters in their order, (name, type of C), and threads a block."""

    symbol: str
    parameters: tuple[tuple[str, str], ...]
    threads: int


@dataclass(frozen=True)
class Source:
    """CUDA C of one module, and its kernels."""

    text: str
    entries: tuple[Entry, ...]


def generate(functions: Sequence[Any], arch: str) -> Source:
    """The CUDA C of TVM's functions, compiled for ``sm_NN``."""
    import tvm

    module = tvm.IRModule({str(function.attrs["global_symbol"]): function for function in functions})
    target = tvm.target.Target({"kind": "cuda", "arch": arch})
    compiled = tvm.compile(module, target=target, tir_pipeline="tirx")
    text = compiled.mod.imports[0].inspect_source()
    _, found, rest = text.partition(_END_OF_TVMS.replace("#define", "  #define"))
    assert found, "TVM begins its CUDA sources otherwise than it used to"
    rest = _GRID.sub("", rest)
    entries = tuple(_entry(match) for match in _DECLARED.finditer(rest))
    rest = _DECLARED.sub("", rest)
    # TVM promises the compiler that no array is another one too, whatever a function says of it.
    shared = {f"{function.attrs['global_symbol']}_kernel" for function in functions if not function.attrs[_NOALIAS]}
    rest = _DEFINED.sub(lambda found: found[0].replace(" __restrict__", "") if found[1] in shared else found[0], rest)
    return Source(f"{PREAMBLE}\n{rest.strip()}\n", entries)


def _entry(declared: re.Match[str]) -> Entry:
    parameters = []
    for text in declared[2].split(","):
        kind, _, name = text.replace("__restrict__", "").strip().rpartition(" ")
        parameters.append((name.removesuffix("_ptr"), kind.strip()))
    threads = _THREADS.search(declared[0])
    assert threads is not None
    return Entry(declared[1], tuple(parameters), int(threads[1]))
