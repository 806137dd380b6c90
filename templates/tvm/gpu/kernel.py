"""How a kernel for a GPU is put together: Python calls TVM's builder, one statement after the other.

A loop of Python unrolls: its statements stand side by side, as tensor cores need it, whose registers must be known when
a kernel is compiled. A loop of the device is ``with loop(begin, end) as i``, a branch ``with when(condition)``.

    def body(x):
        with when(x.thread < x.T):
            store(x.y, x.thread, x.scale * x.x[x.thread])

Kernels are compiled by TVM's ``tirx`` pipeline, which neither adds nor moves a barrier: each is written down.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc, Var

from ..kernel import Values, built

WARP = 32
"""Threads that go on together."""
SIZES = {"uint8": 1, "uint16": 2, "uint32": 4, "int32": 4, "float32": 4}
"""Bytes of a number in memory; 16-bit floats are kept as the bits that they are."""


_MANY = 2**28
"""Elements of an array; the launcher knows how many there are."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the bytes of shared memory that its blocks need."""

    function: PrimFunc
    shared: int


def kernel(
    name: str, warps: int, arguments: dict[str, str], body: Callable[[Values], None], noalias: bool = True
) -> Kernel:
    """The kernel ``name`` of blocks of ``warps`` warps; ``body`` emits its statements.

    ``body`` is called with the arguments, and where a thread is: ``block``, ``row``, ``plane`` (of the grid's x, y, z),
    ``thread``, ``warp`` and ``lane``; and with ``shared``, the block's shared memory.

    Args:
        arguments: types by name: ``*uint16`` is a pointer, ``int32`` a number.
        noalias: no array that is written is another one too.
    """

    shared = Shared()
    types: dict[str, Any] = {}
    for key, kind in arguments.items():
        types[key] = T.Buffer((_MANY,), kind[1:]) if kind[0] == "*" else Var(key, kind)
    # How many blocks there are, no kernel asks: sources are generated without these.
    types |= {f"grid_{axis}": Var(f"grid_{axis}", "int32") for axis in "xyz"}

    def start(named: dict[str, Any]) -> None:
        grid = {f"blockIdx.{axis}": named.pop(f"grid_{axis}") for axis in "xyz"} | {"threadIdx.x": warps * WARP}
        with ExitStack() as scopes:
            for (tag, count), value in zip(grid.items(), ("block", "row", "plane", "thread"), strict=True):
                named[value] = IRBuilder.name(value, scopes.enter_context(T.launch_thread(tag, count)))
            thread = named["thread"]
            place = {"warp": T.truncdiv(thread, WARP), "lane": T.truncmod(thread, WARP)}
            body(Values(**named, **place, shared=shared))

    return Kernel(built(name, types, start, schedulable=False, noalias=noalias), shared.bytes)


def infinity() -> Any:
    """float32 infinity, which CUDA C has no literal for."""
    return T.reinterpret("float32", T.uint32(0x7F800000))


# --- statements


def store(array: Any, index: Any, value: Any) -> None:
    """``array[index] = value``."""
    T.buffer_store(array, value, [index])


def add(array: Any, index: Any, value: Any) -> None:
    """``array[index] += value``."""
    T.buffer_store(array, array[index] + value, [index])


def named(value: Any, name: str) -> Any:
    """A value that is computed once, here."""
    variable = T.bind(value)
    IRBuilder.name(name, variable)
    return variable


def registers(count: int, dtype: str = "float32", name: str = "held") -> Any:
    """Registers of a thread: an array whose indices are known when the kernel is compiled."""
    array = T.alloc_buffer((count,), dtype, scope="local")
    IRBuilder.name(name, array)
    return array


@contextmanager
def loop(begin: Any, end: Any, step: int = 1, trips: str = "") -> Iterator[Any]:
    """Runs on the device, for ``begin, begin + step, ..`` below ``end``.

    ``trips`` says how often, in the words of the cost model: a comment in the machine's assembly, which has no other
    trace of it. Without, it is a constant that Python knows.
    """
    ends = end if step == 1 else T.truncdiv(end - begin + (step - 1), step)
    with T.serial(begin if step == 1 else 0, ends) as i:
        mark(trips or f"times {-(-(end - begin) // step)}")
        yield i if step == 1 else named(begin + i * step, "at")


def mark(text: str) -> None:
    """A comment in the assembly."""
    name = "mark_" + "_".join(re.findall(r"\w+", text))
    code = f'__forceinline__ __device__ void {name}() {{ asm volatile("// mctune: {text}"); }}\n'
    T.evaluate(T.cuda.func_call(name, source_code=code))


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """A branch of the device; a condition that Python knows decides at once, and must hold."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def vector(width: int) -> Iterator[Any]:
    """``width`` lanes of one access to memory."""
    with T.vectorized(width) as e:
        yield e


def choose(condition: Any, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """A branch with two sides."""
    with T.If(condition):
        with T.Then():
            yes()
        with T.Else():
            no()


def lane_xor(value: Any, distance: int) -> Any:
    """The value of the lane whose number differs in the bits of ``distance``."""
    return getattr(T.cuda, "__shfl_xor_sync")(T.uint32(0xFFFFFFFF), value, distance, WARP)


def sum_of_lanes(total: Any, count: int = WARP) -> None:
    """Every ``count`` lanes that are next to each other get the sum of their ``total[0]``."""
    distance = 1
    while distance < count:
        add(total, 0, lane_xor(total[0], distance))
        distance *= 2


def lane_of(value: Any, lane: Any) -> Any:
    """The value of a lane of the warp, counted modulo 32."""
    return getattr(T.cuda, "__shfl_sync")(T.uint32(0xFFFFFFFF), value, T.bitwise_and(lane, WARP - 1), WARP)


def barrier() -> None:
    """All threads of the block have come here, and see what the others have written."""
    T.evaluate(T.cuda.cta_sync())


def warp_barrier() -> None:
    """The same of the threads of a warp."""
    T.evaluate(T.cuda.warp_sync())


def landed() -> None:
    """The thread's copies (:func:`copy_later`) have come; those of others after a barrier."""
    T.evaluate(T.ptx["cp.async.wait_all"]())


def copy_later(to: Any, source: Any, inside: Any) -> None:
    """16 bytes from the device's memory into shared memory by sm_80's ``cp.async``; zeros unless ``inside``."""
    T.evaluate(T.ptx["cp.async.cg.shared.global"](to, source, 16, T.Select(inside, T.uint32(16), T.uint32(0))))


def words_of(array: Any) -> Any:
    """The same array of the device's memory as 32-bit words."""
    return T.decl_buffer((_MANY,), "uint32", data=array.data)


# --- shared memory


class Tile:
    """A matrix in shared memory: ``cols`` numbers from row to row, of which those after the width are room.

    The room staggers rows over the banks of shared memory; a row begins at a multiple of 16 bytes.
    """

    def __init__(self, begin: int, rows: int, width: int, cols: int, dtype: str) -> None:
        self.begin, self.rows, self.width, self.cols, self.dtype = begin, rows, width, cols, dtype
        self.size = SIZES[dtype]
        self.numbers: Any = None
        self.words: Any = None

    @property
    def bytes(self) -> int:
        return -(-self.rows * self.cols * self.size // 16) * 16

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.begin + self.bytes

    def open(self, pool: Any) -> None:
        """Declare it as numbers and as 32-bit words of the pool."""
        for name, dtype in (("numbers", self.dtype), ("words", "uint32")):
            size = SIZES[dtype]
            view = T.decl_buffer(
                (self.bytes // size,), dtype, data=pool.data, elem_offset=self.begin // size, scope="shared.dyn"
            )
            setattr(self, name, view)


class Shared:
    """The shared memory of a block: tiles are taken first, then it is opened."""

    def __init__(self) -> None:
        self.tiles: list[Tile] = []

    def take(self, rows: int, width: int, dtype: str, room: int = 16, at: int = -1) -> Tile:
        """A tile, ``room`` bytes after each row; at byte ``at``, or after all that were taken."""
        begin = at if at >= 0 else self.bytes
        tile = Tile(begin, rows, width, width + room // SIZES[dtype], dtype)
        self.tiles.append(tile)
        return tile

    @property
    def bytes(self) -> int:
        """As many as the block needs."""
        return max((tile.end for tile in self.tiles), default=0)

    def open(self) -> None:
        """Allocate it, and declare the tiles."""
        pool = T.alloc_buffer((self.bytes,), "uint8", scope="shared.dyn")
        IRBuilder.name("pool", pool)
        for tile in self.tiles:
            tile.open(pool)


def pointers(dtype: str, *names: str) -> dict[str, str]:
    """Arguments of a kernel that point to numbers of a type."""
    return {name: f"*{dtype}" for name in names}
