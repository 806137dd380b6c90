"""Instruction classes: which unit one line of PTX, or of an AMD GPU's assembly, loads, and how much."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """The instruction mix of a block: what it asks of each unit of its multiprocessor.

    Attributes:
        matrix: operations of matrix products (a multiply-add counts 2), as many of 16-bit inputs as take that long.
        groups: matrix products that a warpgroup asks for (``wgmma``), one after the other.
        operands: bytes of shared memory that matrix units read themselves (``wgmma``, ``tcgen05.mma``).
        issue: instructions, over all warps; matrix products and moves of registers are not counted.
        fp32: float32 operations, over all threads (a multiply-add counts 1).
        special: exponentials, logarithms, reciprocals and roots, over all threads.
        shared: bytes to and from shared memory, without ``operands``.
        loaded, stored: bytes of global memory; ahead: those of ``loaded`` that a pipelined loop asks for passes ahead.
        loads: instructions of a warp that wait for global memory, copies into shared memory included.
        barriers: synchronisations of the block.
    """

    matrix: float = 0.0
    issue: float = 0.0
    fp32: float = 0.0
    special: float = 0.0
    shared: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0
    loads: float = 0.0
    barriers: float = 0.0
    ahead: float = 0.0
    groups: float = 0.0
    operands: float = 0.0


_PREDICATE = re.compile(r"^@!?%?\w+\s+")
_BITS = re.compile(r"[.](?:b|u|s|f|bf)(8|16|32|64|128)(x2)?\b")
_VECTOR = re.compile(r"[.]v([248])\b")
_SHAPE = re.compile(r"[.]m(\d+)n(\d+)k(\d+)\b")
_FREE = ("mov.", "ld.param", "cvta", "tensormap", "fence", "wgmma", "tcgen05.", "mbarrier", "elect")
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div.")
_FP32 = re.compile(r"^(add|sub|mul|fma|mad|min|max|neg|abs|div)\b.*[.]f32(x2)?\b")
_COST = {"tf32": 2.0, "f16": 1.0, "bf16": 1.0, "f32": 8.0, "f64": 16.0, "xf32": 2.0, "e4m3": 0.5, "e5m2": 0.5}
"""Time of an operation by input type, relative to 16 bits. float32 is what CDNA3 has."""


_OLD = 1.6
"""Time of ``mma.sync`` over that of the instructions that sm_90 and sm_100 have instead: it reaches some 62 %."""
_NEWER = ("90", "100")


def ptx_mix(line: str, warps: int, warp_size: int, constants: Mapping[str, str]) -> Mix:
    """One line of PTX; ``constants``: values of registers that are set to a number, and ``arch``, for example 90."""
    if line.startswith("//"):
        return Mix()
    opcode, _, operands = _PREDICATE.sub("", line).rstrip(";").partition(" ")
    opcode = opcode.partition("\t")[0]
    operands = operands.strip()
    threads = warps * warp_size
    if opcode.startswith(("mma.sync", "wgmma.mma_async", "tcgen05.mma")):
        return _ptx_product(opcode, operands, warps, constants)
    if opcode.startswith(("ld.global", "st.global", "ld.shared", "st.shared", "ld.local", "st.local")):
        moved = _bytes(opcode) * threads
        if "shared" in opcode:
            return Mix(issue=warps, shared=moved)
        if opcode.startswith("st."):
            return Mix(issue=warps, stored=moved)
        return Mix(issue=warps, loaded=moved, loads=1.0)
    if opcode.startswith("cp.async.c") and "global" in opcode and "bulk" not in opcode:
        size = re.search(r",\s*(0x[0-9a-fA-F]+|\d+)\b", operands.rpartition("]")[2])
        moved = (int(size[1], 0) if size else 16) * threads
        return Mix(issue=warps, loaded=moved, shared=moved, loads=1.0, ahead=moved)
    if opcode.startswith(("ldmatrix", "stmatrix")):
        matrices = re.search(r"[.]x([124])\b", opcode)
        return Mix(issue=warps, shared=4.0 * (int(matrices[1]) if matrices else 1) * threads)
    if opcode.startswith("tcgen05.ld") or opcode.startswith("tcgen05.st"):
        # Tensor memory: a word for each thread and column, about as fast as shared memory.
        columns = re.search(r"[.]x(\d+)\b", opcode)
        return Mix(issue=warps, shared=4.0 * (int(columns[1]) if columns else 1) * threads)
    if opcode.startswith("shfl"):
        return Mix(issue=warps, shared=4.0 * threads)
    if opcode.startswith("bar"):
        return Mix(issue=warps, barriers=1.0)
    if opcode.startswith(_FREE):
        return Mix()
    pair = 2.0 if ".f32x2" in opcode else 1.0
    fp32 = pair * threads if _FP32.match(opcode) else 0.0
    if opcode.startswith(_SPECIAL):
        # An exact division or square root is an approximation and a few float32 steps.
        steps = 8.0 if opcode.startswith(("div.", "sqrt.rn")) else 1.0
        return Mix(issue=warps * steps, fp32=fp32 * (steps - 1), special=threads)
    return Mix(issue=warps, fp32=fp32)


_K_BYTES = 32
"""Bytes of an operand's row that one instruction reads, whatever the type: 16 numbers of 16 bits, 8 of TF32."""


def _ptx_product(opcode: str, operands: str, warps: int, constants: Mapping[str, str]) -> Mix:
    """One instruction, for all warps of the block that take part in it."""
    if opcode.startswith("tcgen05"):
        # One thread issues it for the whole block; M and N are in the instruction descriptor, K is 32 bytes.
        parts = [part.strip() for part in operands.split(",")]
        code = int(constants.get(parts[3], "0")) if len(parts) > 3 else 0
        rows, columns = (code >> 24 & 31) << 4 or 128, (code >> 17 & 63) << 3 or 64
        wide = 8 if "tf32" in opcode else 32 if "f8" in opcode else 16
        cost = _COST["tf32"] if "tf32" in opcode else 0.5 if "f8" in opcode else 1.0
        # A left factor given as an address, not a descriptor, is in tensor memory.
        read = columns + (0 if len(parts) > 1 and parts[1].startswith("[") else rows)
        return Mix(matrix=2.0 * rows * columns * wide * cost, operands=float(_K_BYTES * read))
    shape = _SHAPE.search(opcode)
    if shape is None:
        return Mix()
    m, n, k = (int(part) for part in shape.groups())
    # After the shape come layouts and types: those of D, A, B and so on.
    types = [part for part in opcode[shape.end() :].split(".") if part not in ("", "row", "col")]
    cost = _COST.get(types[1], 1.0) if len(types) > 1 else 1.0
    if opcode.startswith("wgmma"):
        # Each warpgroup reads its own 64 rows of A, unless they are in registers, and all of B.
        groups = warps / 4
        read = n + (0 if operands.partition("}")[2].lstrip(", ").startswith("{") else m)
        return Mix(matrix=2.0 * m * n * k * cost * groups, operands=_K_BYTES * read * groups, groups=1.0)
    return Mix(matrix=2.0 * m * n * k * cost * warps * (_OLD if constants.get("arch") in _NEWER else 1.0))


def _bytes(opcode: str) -> float:
    """Bytes that a thread moves with a load or store."""
    bits, vector = _BITS.findall(opcode), _VECTOR.search(opcode)
    if not bits:
        return 4.0
    size, pair = bits[-1]
    return int(size) / 8 * (2 if pair else 1) * (int(vector[1]) if vector else 1)


_AMD_PRODUCT = re.compile(r"^v_mfma_(?:f32|f64|i32)_(\d+)x(\d+)x(\d+)_?(\d+b_)?(xf32|bf16|f16|f32|bf8|fp8|f64)")
_AMD_MEMORY = re.compile(r"^(global|buffer|flat)_(load|store|atomic)_(\w+)")
_AMD_SHARED = re.compile(r"^ds_(read|write)(2st64|2)?_([bui])(\d+)")
_AMD_SPECIAL = re.compile(r"^v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_SIZES = {
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "short": 2, "ushort": 2, "sshort": 2, "ubyte": 1,
    "sbyte": 1, "byte": 1,
}  # fmt: skip


def amd_mix(line: str, warps: int, warp_size: int) -> Mix:
    """One line of a CDNA GPU's assembly."""
    opcode = line.split(None, 1)[0]
    threads = warps * warp_size
    product = _AMD_PRODUCT.match(opcode)
    if product:
        m, n, k = (int(part) for part in product.groups()[:3])
        return Mix(matrix=2.0 * m * n * k * _COST.get(product[5], 1.0) * warps)
    memory = _AMD_MEMORY.match(opcode)
    if memory:
        moved = _AMD_SIZES.get(memory[3].split("_")[0], 4) * threads
        if memory[2] == "store":
            return Mix(issue=warps, stored=moved)
        return Mix(issue=warps, loaded=moved, loads=1.0, ahead=moved)
    shared = _AMD_SHARED.match(opcode)
    if shared:
        return Mix(issue=warps, shared=int(shared[4]) / 8 * (2 if shared[2] else 1) * threads)
    if opcode.startswith(("ds_bpermute", "ds_permute", "ds_swizzle")):
        return Mix(issue=warps, shared=4.0 * threads)
    if opcode == "s_barrier":
        return Mix(barriers=1.0)
    if not opcode.startswith("v_"):
        return Mix()  # scalar instructions issue in parallel with vector ones
    if _AMD_SPECIAL.match(opcode):
        return Mix(issue=warps, special=threads)
    pair = 2.0 if opcode.startswith("v_pk_") else 1.0
    return Mix(issue=warps, fp32=pair * threads if re.search(r"_f32", opcode) else 0.0)
