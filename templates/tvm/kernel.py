"""How a template is put together: a kernel's arguments as one ordered table, its values by name, its steps as functions.

A step is a Python function that takes compile-time sizes and flags, the kernel's values, and writes its statements into
the kernel at work: ``@emit`` above a function of TVMScript parses it there and then. So a step is called by keyword from
TVMScript, reads like it, and is as long as what it does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import from_source
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc, Var


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

    def start(**named: Any) -> None:
        body(Values(**vars(run_time) | named))

    types = {
        key: T.Buffer(a.shape, a.dtype, align=a.align) if isinstance(a, Array) else a for key, a in arguments.items()
    }
    source = f"""
@T.prim_func(s_tir=True)
def {name}({", ".join(f"{key}: types[{key!r}]" for key in arguments)}):
    T.func_attr({{"global_symbol": {name!r}, "tirx.noalias": True}})
    start({", ".join(f"{key}={key}" for key in arguments)})
"""
    return from_source(source, extra_vars={"T": T, "types": types, "start": start})


def emit(function: Callable[[], None]) -> None:
    """Decorator: parse the TVMScript of ``function``, at once, into the kernel at work."""
    T.inline(function)()


def scratch(**arrays: Array) -> Values:
    """Allocate arrays in the scope at work; in TVMScript, ``x = T.meta_var(scratch(...))``."""
    found = {}
    for name, array in arrays.items():
        found[name] = T.alloc_buffer(array.shape, array.dtype, scope=array.scope)
        IRBuilder.name(name, found[name])
    return Values(**found)
