"""How a template is put together: arguments as one ordered table, values by name, steps as functions.

A step is a Python function that takes the plan (sizes and flags that are known when the kernel is compiled) and the
kernel's values, and adds statements to the kernel at work: ``@emit`` parses a function of TVMScript there and then. So
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

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tvm.script import from_source
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.parser._core import scan_macro, utils
from tvm.tirx import PrimFunc, Var
from tvm.tirx.script.parser.entry import TIRInline


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


class _Inline(TIRInline):
    """``T.inline``, which finds the parser at work without ``inspect.getouterframes``.

    That one looks up the source of every frame on the stack: most of the time of a build.
    """

    def _find_parser_def(self) -> Any:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if self.parser_object_name in frame.f_globals:
                return frame.f_globals[self.parser_object_name]
            frame = frame.f_back
        raise RuntimeError(f"{self.func.__name__} is TVMScript, and no kernel is at work")


def inline(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: TVMScript that is parsed wherever it is called, with its parameters and what it closes over."""
    source, closed_over = scan_macro(function, utils.inspect_function_capture(function))
    found = _Inline(source, closed_over, function)

    def call(*arguments: Any, **named: Any) -> None:
        found(*arguments, **named)

    return call


def emit(function: Callable[[], None]) -> None:
    """Decorator: parse the TVMScript of ``function``, at once, into the kernel at work."""
    inline(function)()


def scratch(**arrays: Array) -> Values:
    """Allocate arrays in the scope at work; in TVMScript, ``x = T.meta_var(scratch(...))``."""
    found = {}
    for name, array in arrays.items():
        found[name] = T.alloc_buffer(array.shape, array.dtype, scope=array.scope)
        IRBuilder.name(name, found[name])
    return Values(**found)
