"""What translated TVMScript (:mod:`script`) calls: TVM's builder, with what TVM's own parser does around it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from tvm.ir import Call, Expr, is_prim_expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.parser._core import doc
from tvm.script.parser.core.evaluator import _eval_op
from tvm.tirx import Var, const, is_buffer_var
from tvm.tirx.expr import ExprOp
from tvm.tirx.op import if_then_else
from tvm.tirx.script.builder.frame import ForFrame


class Builder:
    """A statement or an operator of TVMScript a method; those whose meaning is not Python's."""

    # --- statements

    def range(self, *ends: Any, **options: Any) -> ForFrame:
        """A serial loop; Python's range takes no run-time values."""
        if len(ends) == 1:
            return T.serial(0, ends[0], **options)
        begin, end, *step = ends
        return T.serial(begin, end, **options, **({"step": step[0]} if step else {}))

    @contextmanager
    def loop(self, frame: ForFrame, name: str) -> Iterator[Var]:
        if not isinstance(frame, ForFrame):
            raise TypeError(f"a loop is over range, T.parallel, T.unroll or T.vectorized, not {type(frame).__name__}")
        with frame as value:
            yield IRBuilder.name(name, value)

    @contextmanager
    def branch(self, condition: Any) -> Iterator["Branch"]:
        if isinstance(condition, bool):
            yield Branch(taken=condition, otherwise=not condition, frames=False)
        elif _at_run_time(condition):
            with T.If(condition):
                yield Branch(taken=True, otherwise=True, frames=True)
        else:
            raise _no_condition(condition)

    def store(self, array: Any, value: Any, index: Any) -> None:
        T.buffer_store(array, value, index)

    def bind(self, value: Any, name: str) -> Any:
        """A value of Python's that a template says is one, or an array, which gets its name."""
        if isinstance(value, T.meta_var):
            return value.value
        if is_buffer_var(value):
            return IRBuilder.name(name, value)
        raise TypeError(f"{name} = {value!r} is neither T.meta_var nor T.alloc_buffer; a value is {name}: T.let = ..")

    def let(self, value: Any, name: str) -> Any:
        """A value that is computed once, here."""
        value = value if isinstance(value, Expr) else const(value)
        variable = IRBuilder.name(name, T.let.as_var(rhs_dtype=value.ty))
        T.Bind(value, var=variable)
        return variable

    def statement(self, value: Any) -> None:
        """A call for its effect, mostly of a function of templates, which gives nothing."""
        if isinstance(value, Call) or is_prim_expr(value):
            T.evaluate(value)
        elif not (value is None or isinstance(value, str)):
            raise TypeError(f"a statement is a call that gives nothing, not {value!r}")

    # --- expressions

    def compare(self, operator: str, left: Any, right: Any) -> Any:
        return _eval_op(getattr(doc, operator)(), [left, right])

    def negation(self, value: Any) -> Any:
        return _eval_op(doc.Not(), [value])

    def join(self, operator: str, *values: Callable[[], Any]) -> Any:
        """``and``, ``or``; what Python knows decides alone where it can."""
        found = values[0]()
        for value in values[1:]:
            if isinstance(found, bool) and found == (operator == "Or"):
                return found
            found = _eval_op(getattr(doc, operator)(), [found, value()])
        return found

    def choose(self, condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        if isinstance(condition, bool):
            return yes() if condition else no()
        if not _at_run_time(condition):
            raise _no_condition(condition)
        return if_then_else(condition, yes(), no())


class Branch:
    """An ``if`` at work: which of its sides are to be emitted, and what is around each."""

    def __init__(self, taken: bool, otherwise: bool, frames: bool) -> None:
        self.taken, self.otherwise, self.frames = taken, otherwise, frames

    def then(self) -> AbstractContextManager[Any]:
        return T.Then() if self.frames else nullcontext()

    def otherwise_then(self) -> AbstractContextManager[Any]:
        return T.Else() if self.frames else nullcontext()


def _at_run_time(condition: Any) -> bool:
    return is_prim_expr(condition) or isinstance(condition, ExprOp)


def _no_condition(value: Any) -> TypeError:
    return TypeError(f"a condition is a bool or known at run time, not {value!r}")
