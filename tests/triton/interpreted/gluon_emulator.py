"""Runs a Gluon kernel of specialised warps in Python: its own source, on stand-ins for what it uses of Gluon.

It shows wrong indices, masks, barriers, phases and arithmetic, and deadlocks. It says nothing of layouts, of fences,
and of what the compiler makes of the source. Partitions take turns, drawn at random, wherever one meets a barrier. A
copy fills its stage with NaN when it is issued, and with numbers only when somebody waits for it; an asynchronous
product reads its operands when it is waited for.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


class Deadlock(Exception):
    """Every partition waits for a barrier."""


class Misuse(Exception):
    """More arrivals than a barrier counts: hardware would go on with a wrong count."""


@dataclass
class Pointer:
    """An array, and the places in it that are pointed at."""

    array: torch.Tensor
    place: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.array.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.array, self.place + other)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Where to read or write, all inside the array, and which of it is meant."""
        place = torch.as_tensor(self.place, dtype=torch.int64)
        mask = torch.ones_like(place, dtype=torch.bool) if mask is None else mask.expand(place.shape)
        assert bool(((place >= 0) & (place < self.array.numel()))[mask].all()), "outside of the array"
        return torch.where(mask, place, 0), mask


@dataclass
class Shared:
    """Shared memory."""

    array: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.array.dtype

    def index(self, i: int) -> Shared:
        return Shared(self.array[i])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.array.permute(*order))


@dataclass
class Barrier:
    """An mbarrier: a phase ends when ``count`` have arrived and all bytes have come."""

    count: int = 0
    arrived: int = 0
    bytes: int = 0
    phases: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived > self.count:
            raise Misuse(f"{self.arrived} arrivals, and the barrier counts {self.count}")
        self.settle()

    def settle(self) -> None:
        if self.arrived == self.count and self.bytes == 0:
            self.phases, self.arrived = self.phases + 1, 0

    def ended(self, parity: int) -> bool:
        return self.phases % 2 != parity


class Barriers(list[Barrier]):
    """Several."""

    index = list.__getitem__  # type: ignore[assignment]


class Turns:
    """Threads of which one runs at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.ready: dict[int, Callable[[], bool]] = {}
        self.wake: dict[int, threading.Semaphore] = {}
        self.own = threading.local()
        self.failed: BaseException | None = None

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        threads = []
        for number, function in enumerate(functions):
            self.ready[number], self.wake[number] = (lambda: True), threading.Semaphore(0)
            threads.append(threading.Thread(target=self._one, args=(number, function)))
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed

    def _one(self, number: int, function: Callable[[], None]) -> None:
        self.own.number = number
        self.wake[number].acquire()
        try:
            if self.failed is None:
                function()
        except BaseException as error:
            self.failed = self.failed or error
        del self.ready[number]
        self._next()

    def _next(self) -> None:
        able = [number for number, ready in self.ready.items() if self.failed is not None or ready()]
        if self.ready and not able:
            self.failed = Deadlock()
            able = list(self.ready)
        if able:
            self.wake[self.random.choice(able)].release()

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run until ``ready``."""
        number = self.own.number
        self.ready[number] = ready
        self._next()
        self.wake[number].acquire()
        if self.failed is not None:
            raise self.failed


class Emulated:
    """What stands for a kernel: ``kernel[grid](...)`` runs one program after another."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self.program = (0, 0)
        self.turns = Turns(0)
        names = {**vars(module), "gl": self.language(), "mbarrier": self.barriers(), "copy_async": self.copy}
        names |= {"fence_async_shared": lambda: None, "warpgroup_mma": product, "warpgroup_mma_wait": finished}
        for key, value in vars(module).items():
            if isinstance(value, tl.constexpr):
                names[key] = value.value
            elif hasattr(value, "is_gluon"):
                names[key] = FunctionType(value.fn.__code__, names, key, value.fn.__defaults__)
        self.function = names[name]

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(num_warps: int, **given: Any) -> None:
            for y in range(grid[1]):
                for x in range(grid[0]):
                    self.program = (x, y)
                    self.function(**{name: argument(value) for name, value in given.items()})

        return launch

    def language(self) -> SimpleNamespace:
        def nothing(*_: Any, **__: Any) -> None:
            return None

        return SimpleNamespace(
            int64=torch.int64, float32=torch.float32, static_range=range, exp=torch.exp, where=where, zeros=zeros,
            minimum=torch.minimum, maximum=maximum, load=load, store=store, allocate_shared_memory=allocate,
            arange=lambda first, end, layout: torch.arange(first, end, dtype=torch.int32),
            convert_layout=lambda x, layout: x, program_id=lambda axis: torch.tensor(self.program[axis]),
            NVMMADistributedLayout=nothing, SliceLayout=nothing, DotOperandLayout=nothing,
            warp_specialize=self.specialize,
        )  # fmt: skip

    def barriers(self) -> SimpleNamespace:
        def init(barrier: Barrier, count: int) -> None:
            barrier.count = count

        def expect(barrier: Barrier, bytes: int) -> None:
            barrier.bytes += bytes
            barrier.arrive()
            self.turns.wait()

        def arrive(barrier: Barrier, count: int) -> None:
            assert count == 1
            barrier.arrive()
            self.turns.wait()

        def wait(barrier: Barrier, parity: int) -> None:
            for copy in barrier.copies:
                copy()
            barrier.copies.clear()
            self.turns.wait(lambda: bool(barrier.copies) or barrier.ended(parity))
            if not barrier.ended(parity):
                wait(barrier, parity)

        return SimpleNamespace(MBarrierLayout=lambda: None, init=init, expect=expect, arrive=arrive, wait=wait)

    def copy(self, x: TensorDescriptor, corner: Sequence[Any], barrier: Barrier, into: Shared) -> None:
        row, column = (int(place) for place in corner)
        rows, columns = x.block_shape
        assert list(into.array.shape) == [rows, columns] and row >= 0 and 0 <= column <= x.shape[1] - columns
        found = torch.zeros(rows, columns, dtype=x.base.dtype)
        inside = x.base[row : row + rows, column : column + columns]
        found[: len(inside)] = inside
        into.array.fill_(float("nan"))

        def arrives() -> None:
            into.array.copy_(found)
            barrier.bytes -= found.numel() * found.element_size()
            barrier.settle()

        barrier.copies.append(arrives)
        self.turns.wait()

    def specialize(self, partitions: Sequence[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
        assert len(warps) == len(registers) == len(partitions) - 1
        self.turns = Turns(self.turns.random.randrange(1 << 30))
        self.turns.run([lambda f=f, given=given: f(*given) for f, given in partitions])  # type: ignore[misc]


def argument(value: Any) -> Any:
    """What a kernel sees of an argument."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1))
    if isinstance(value, TensorDescriptor):
        value.dtype = value.base.dtype  # type: ignore[attr-defined]
    return value


def load(pointer: Pointer, mask: Any = None, other: Any = None) -> torch.Tensor:
    place, mask = pointer.places(mask)
    found = pointer.array[place]
    return found if other is None else torch.where(mask, found, other)


def store(pointer: Pointer, value: torch.Tensor, mask: Any) -> None:
    place, mask = pointer.places(mask)
    pointer.array[place[mask]] = value[mask]


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared | Barrier | Barriers:
    if dtype == torch.int64:
        return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(tuple(shape), float("nan"), dtype=dtype))


def where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


def maximum(x: torch.Tensor, y: float, propagate_nan: tl.PropagateNan) -> torch.Tensor:
    assert propagate_nan == tl.PropagateNan.ALL
    return torch.maximum(x, torch.tensor(y))


def zeros(shape: Sequence[int], dtype: torch.dtype, layout: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def product(a: Any, b: Shared, acc: torch.Tensor, use_acc: bool = True, is_async: bool = False) -> Any:
    def later() -> torch.Tensor:
        made = (a.array if isinstance(a, Shared) else a).float() @ b.array.float()
        return acc + made if use_acc else made

    return later if is_async else later()


def finished(left: int, products: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
    assert left == 0
    return [later() for later in products]
