"""How a template is put together: arguments as one ordered table, values by name, steps as functions.

A step is a Python function that takes the plan (sizes and flags that are known when the kernel is compiled) and the
kernel's values, and adds statements to the kernel at work: ``@emit`` takes a function of TVMScript there and then. So
TVMScript calls steps by keyword, and no function is longer than a screen:

    def scale_rows(plan, x, *, factor):
        Dk, y = plan.Dk, x.y

        @emit
        def rows():
            for r in T.parallel(x.R):
                for d in T.vectorized(Dk):
                    y[r, d] = factor * y[r, d]

Only names that the inner function closes over reach its TVMScript: what a step reads often, it first gives a name. By
custom ``plan`` is what is known at compile time, ``x`` the kernel's arguments and sizes, ``at`` those and what a task
adds to them: its scratch arrays, and the head and segment where it is at work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import IRModule
from tvm.s_tir.analysis import verify_well_formed
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc, Var
from tvm.tirx.analysis import verify_tirx_well_formed
from tvm.tirx.script.builder import prim_func as frame_of

from .script import translated


@dataclass(frozen=True, eq=False)
class Array:
    """An array that a kernel takes or allocates. ``align`` in bytes; 0 for TVM's default of 64."""

    shape: tuple[Any, ...]
    dtype: str
    scope: str = "global"
    align: int = 0


def f32(*shape: Any, scope: str = "global", align: int = 0) -> Array:
    return Array(shape, "float32", scope, align)


def i32(*shape: Any, scope: str = "global", align: int = 0) -> Array:
    return Array(shape, "int32", scope, align)


class Values:
    """Values of a kernel, each an attribute: arrays, run-time sizes, the place where a task is at work."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def plus(self, *others: "Values", **values: Any) -> "Values":
        """These and others, of which none may have a name that is taken."""
        merged = dict(vars(self))
        for more in (*(vars(other) for other in others), values):
            taken = merged.keys() & more.keys()
            assert not taken, f"values named twice: {', '.join(sorted(taken))}"
            merged |= more
        return Values(**merged)


def sizes(*names: str) -> Values:
    """Run-time values of 32 bits, by name."""
    return Values(**{name: Var(name, "int32") for name in names})


def prim_func(
    name: str, arguments: dict[str, Array | Var], run_time: Values, body: Callable[[Values], None]
) -> PrimFunc:
    """The PrimFunc ``name`` with ``arguments`` in that order; ``body`` emits its statements.

    ``body`` is called with the arguments and the sizes ``run_time`` as values.
    """
    types = {key: _typed(kind) for key, kind in arguments.items()}
    return built(name, types, lambda named: body(Values(**vars(run_time) | named)), schedulable=True)


def _typed(kind: Any) -> Any:
    if isinstance(kind, Array):
        return T.Buffer(kind.shape, kind.dtype, align=kind.align)
    return kind if isinstance(kind, Var) else kind()  # T.float32


def built(
    name: str, types: dict[str, Any], body: Callable[[dict[str, Any]], None], schedulable: bool, noalias: bool = True
) -> PrimFunc:
    """The PrimFunc ``name`` of arguments of ``types``, in order; ``body`` is called with them, by name.

    Args:
        schedulable: of ``s_tir``, TVM's dialect for CPUs here; else of ``tirx``.
        noalias: no array that is written is another one too.
    """
    with IRBuilder() as builder:
        with frame_of(s_tir=schedulable):
            T.func_name(name)
            named = {key: T.arg(key, kind) for key, kind in types.items()}
            T.func_attr({"global_symbol": name, "tirx.noalias": noalias})
            body(named)
    function = builder.get()
    verify_well_formed(IRModule.from_expr(function))
    if not schedulable:
        verify_tirx_well_formed(function)
    return function


def inline(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: TVMScript that is emitted wherever it is called, with its parameters and what it closes over."""
    return translated(function)


def emit(function: Callable[[], None]) -> None:
    """Decorator: add the TVMScript of ``function``, at once, to the kernel at work."""
    translated(function)()


def scratch(**arrays: Array) -> Values:
    """Allocate arrays in the scope at work; in TVMScript, ``x = T.meta_var(scratch(...))``."""
    found = {}
    for name, array in arrays.items():
        found[name] = T.alloc_buffer(array.shape, array.dtype, scope=array.scope)
        IRBuilder.name(name, found[name])
    return Values(**found)
