"""Render a Triton template for one problem and configuration: unused code goes, comments and formatting stay."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import libcst as cst

from mctune.backends.triton.fold import CannotFold, Flag, code, constant, fold_function, names
from mctune.backends.triton.layout import Signature, without
from mctune.core.config import Scalar

Value: TypeAlias = Scalar


def render(source: str, values: Mapping[str, Value]) -> str:
    """The module ``source`` with what ``values`` says, by the names of constexpr parameters.

    Bools and strings are flags: they are folded in kernels, in jit helpers and in host functions, and of branches only
    those that are taken stay. Integers become constants of the module; kernels keep them as constexpr parameters. No
    public host function has a parameter of ``values`` any more, and no kernel one that its body does not use. Kernels,
    helpers, constants and imports that are not used go. A parameter of ``source`` that has no value stays.

    Raises:
        CannotFold: naming the function and the expression, where a flag is used in any other way.
    """
    flags = tuple((name, value) for name, value in values.items() if isinstance(value, bool | str))
    module, unbound, given = _folded(source, flags, frozenset(values))
    for one in given:
        one.check(values)
    constants = {name: value for name, value in values.items() if name in unbound}
    rendered = _with_constants(module, constants).code
    ast.parse(rendered)
    return rendered


@cache
def _folded(
    source: str, flagged: tuple[tuple[str, Flag], ...], values: frozenset[str]
) -> tuple[cst.Module, set[str], list[_Given]]:
    """The module with its flags folded, without what goes; which of ``values`` it needs as constants; what is given.

    Configurations that differ in sizes alone share it.
    """
    module, flags = _parse(source), dict(flagged)
    functions = {f.name: f for f in (_function(x, flags) for x in module.body if isinstance(x, cst.FunctionDef))}
    for function in functions.values():
        for name in sorted(values & set(function.params) & _assigned(function.node)):
            raise CannotFold(f"{function.name}: {name} is a constexpr with a value, and is assigned")
        function.gone = {name for name in function.params if name in (values if function.public else flags)}
    _find_dead(functions)
    used = _reachable(module, functions)
    given = [
        one
        for function in functions.values()
        if function.name in used
        for one in _given(function, functions, values, flags)
    ]

    signatures = {name: Signature(list(function.params), function.gone) for name, function in functions.items()}
    body: list[cst.CSTNode] = []
    unbound: set[str] = set()
    for statement in module.body:
        if isinstance(statement, cst.FunctionDef):
            function = functions[statement.name.value]
            statement = without(function.node, signatures)
            unbound |= function.gone & names(statement.body)
        body.append(statement)
    return _prune(module.with_changes(body=body)), unbound, given


@cache
def _parse(source: str) -> cst.Module:
    return cst.parse_module(source)


@dataclass
class _Function:
    """A function of the module, its flags folded.

    Attributes:
        params: its parameters, with their defaults.
        jit: whether Triton compiles it.
        gone: the parameters that it loses.
    """

    name: str
    node: cst.FunctionDef
    params: dict[str, cst.BaseExpression | None]
    jit: bool
    gone: set[str] = field(default_factory=set)

    @property
    def public(self) -> bool:
        """Whether it is what launchers call."""
        return not self.jit and not self.name.startswith("_")


def _function(node: cst.FunctionDef, flags: Mapping[str, Flag]) -> _Function:
    params = {x.name.value: x.default for x in (*node.params.params, *node.params.kwonly_params)}
    jit = any(code(x.decorator).partition("(")[0].rpartition(".")[2] == "jit" for x in node.decorators)
    own = {name: flags[name] for name in params if name in flags}
    return _Function(node.name.value, fold_function(node, own, jit), params, jit)


def _assigned(node: cst.FunctionDef) -> set[str]:
    """The names that a function assigns."""
    tree = ast.parse(code(node))
    return {x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}


@dataclass(frozen=True)
class _Call:
    """A call of a function of the module; ``args`` by parameter, ``starred`` where some are not known."""

    callee: _Function
    args: dict[str, cst.Arg]
    starred: bool
    text: str


class _Calls(cst.CSTVisitor):
    """The calls of the module's own functions, and the names that stand anywhere else."""

    def __init__(self, functions: Mapping[str, _Function]) -> None:
        self.functions = functions
        self.calls: list[_Call] = []
        self.elsewhere: set[str] = set()

    def visit_Call(self, node: cst.Call) -> bool:
        function = callee(node)
        if function is None or function not in self.functions:
            return True
        if isinstance(node.func, cst.Subscript):
            for element in node.func.slice:
                element.visit(self)
        called = self.functions[function]
        order = list(called.params)
        args = {x.keyword.value if x.keyword else order[i]: x for i, x in enumerate(node.args) if not x.star}
        self.calls.append(_Call(called, args, any(x.star for x in node.args), code(node)))
        return False

    def visit_Name(self, node: cst.Name) -> None:
        self.elsewhere.add(node.value)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False


def callee(node: cst.Call) -> str | None:
    """The name in ``name(...)`` and in ``name[grid](...)``."""
    function = node.func.value if isinstance(node.func, cst.Subscript) else node.func
    return function.value if isinstance(function, cst.Name) else None


def _calls(function: _Function, functions: Mapping[str, _Function]) -> _Calls:
    visitor = _Calls(functions)
    function.node.body.visit(visitor)
    nested = list(visitor.calls)
    while nested:
        # Arguments may be calls themselves.
        inner = _Calls(functions)
        for arg in nested.pop().args.values():
            arg.value.visit(inner)
        visitor.elsewhere |= inner.elsewhere & functions.keys()
        visitor.calls += inner.calls
        nested += inner.calls
    return visitor


def _find_dead(functions: Mapping[str, _Function]) -> None:
    """Add to what kernels and jit helpers lose: parameters that nothing uses but arguments that go too."""
    found = {name: _calls(function, functions) for name, function in functions.items()}
    escaping = set().union(*(calls.elsewhere for calls in found.values()))
    alive: set[tuple[str, str]] = set()
    for name, function in functions.items():
        whole = not function.jit or name in escaping
        whole |= any(call.starred for calls in found.values() for call in calls.calls if call.callee is function)
        alive |= {(name, param) for param in function.params if whole or param in found[name].elsewhere}
    while True:
        more = {
            (name, read)
            for name, calls in found.items()
            for call in calls.calls
            for param, arg in call.args.items()
            if (call.callee.name, param) in alive
            for read in names(arg.value) - functions.keys()
        } - alive
        if not more:
            break
        alive |= more
    for name, function in functions.items():
        if function.jit:
            function.gone |= {param for param in function.params if (name, param) not in alive}


@dataclass(frozen=True)
class _Given:
    """What a call gives a parameter that goes: nothing but that parameter's value will do.

    ``constant``: whether it is one, and which.
    """

    function: str
    call: _Call
    name: str
    text: str
    constant: tuple[bool, object]

    def check(self, values: Mapping[str, Value]) -> None:
        """Refuse another value.

        Raises:
            CannotFold: with both.
        """
        if self.call.starred or self.constant != (True, values[self.name]):
            raise CannotFold(
                f"{self.function}: `{self.call.text}` gives {self.name} = {self.text}, and "
                f"{self.call.callee.name} is rendered for {values[self.name]!r}"
            )


def _given(
    function: _Function, functions: Mapping[str, _Function], values: AbstractSet[str], flags: Mapping[str, Flag]
) -> Iterator[_Given]:
    """What the calls of a function give parameters that have a value, and go, unless it is the function's own."""
    found = _calls(function, functions)
    for name in found.elsewhere & functions.keys():
        lost = sorted(functions[name].gone & values)
        if lost:
            raise CannotFold(f"{function.name}: {name} is used without a call, and its {', '.join(lost)} would go")
    for call in found.calls:
        for name in sorted(call.callee.gone & values):
            if call.callee.jit and name not in flags:
                continue  # a tile size that the kernel no longer uses
            arg = call.args.get(name)
            given = call.callee.params[name] if arg is None else arg.value
            own = isinstance(given, cst.Name) and given.value == name and name in function.params
            if call.starred or not own:
                text, same = ("nothing", (False, None)) if given is None else (code(given), constant(given))
                yield _Given(function.name, call, name, text, same)


def _reachable(module: cst.Module, functions: Mapping[str, _Function]) -> set[str]:
    """The names that public functions, and statements other than definitions, use in the end."""
    uses: dict[str, set[str]] = {}
    wanted: set[str] = set()
    for statement in module.body:
        if isinstance(statement, cst.FunctionDef):
            node = functions[statement.name.value].node if functions else statement
            uses[statement.name.value] = names(node) - {statement.name.value}
            if not statement.name.value.startswith("_") and not _is_jit(statement):
                wanted.add(statement.name.value)
        elif (target := _constant_of(statement)) is not None:
            uses[target] = names(statement) - {target}
        elif not _is_import(statement):
            wanted |= names(statement)
    open_ = list(wanted)
    while open_:
        new = uses.get(open_.pop(), set()) - wanted
        wanted |= new
        open_ += new
    return wanted


def _is_jit(node: cst.FunctionDef) -> bool:
    return any(code(x.decorator).partition("(")[0].rpartition(".")[2] == "jit" for x in node.decorators)


def _is_import(statement: cst.CSTNode) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[0], cst.Import | cst.ImportFrom)


def _is_text(statement: cst.CSTNode) -> bool:
    """Whether a statement is a docstring."""
    line = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    return isinstance(line, cst.Expr) and isinstance(line.value, cst.SimpleString | cst.ConcatenatedString)


def _constant_of(statement: cst.CSTNode) -> str | None:
    """The name in ``NAME = ...`` at the module's top level."""
    line = statement.body[0] if isinstance(statement, cst.SimpleStatementLine) else None
    if isinstance(line, cst.Assign) and len(line.targets) == 1:
        target: cst.CSTNode = line.targets[0].target
    elif isinstance(line, cst.AnnAssign):
        target = line.target
    else:
        return None
    return target.value if isinstance(target, cst.Name) else None


def _prune(module: cst.Module) -> cst.Module:
    """The module without functions, constants and imports that are not used."""
    wanted = _reachable(module, {})
    body: list[cst.CSTNode] = []
    dropped = False
    for statement in module.body:
        # The string after a constant documents it.
        dropped = dropped and _is_text(statement)
        if isinstance(statement, cst.FunctionDef):
            dropped = statement.name.value not in wanted
        elif (target := _constant_of(statement)) is not None:
            dropped = target not in wanted
        elif _is_import(statement):
            statement_or_none = _import(statement, wanted)
            if statement_or_none is None:
                continue
            statement = statement_or_none
        if not dropped:
            body.append(statement)
    return module.with_changes(body=body)


def _import(statement: cst.CSTNode, wanted: Iterable[str]) -> cst.SimpleStatementLine | None:
    """An import of what is used, or None."""
    assert isinstance(statement, cst.SimpleStatementLine)
    line = statement.body[0]
    assert isinstance(line, cst.Import | cst.ImportFrom)
    if isinstance(line.names, cst.ImportStar) or code(line).startswith("from __future__"):
        return statement
    kept = [x for x in line.names if _bound(x) in wanted]
    if len(kept) == len(line.names):
        return statement
    if not kept:
        return None
    kept[-1] = kept[-1].with_changes(comma=line.names[-1].comma)
    return statement.with_changes(body=[line.with_changes(names=kept)])


def _bound(alias: cst.ImportAlias) -> str:
    """The name that an import binds."""
    return code(alias.asname.name if alias.asname is not None else alias.name).partition(".")[0]


def _with_constants(module: cst.Module, constants: Mapping[str, Value]) -> cst.Module:
    """``NAME = value`` after the imports."""
    if not constants:
        return module
    lines = [
        cst.parse_statement(f"{name} = {value!r}").with_changes(leading_lines=[cst.EmptyLine(indent=False)] * first)
        for name, value, first in zip(constants, constants.values(), (1, *[0] * len(constants)), strict=False)
    ]
    at = max((i + 1 for i, statement in enumerate(module.body) if _is_import(statement)), default=0)
    return module.with_changes(body=[*module.body[:at], *lines, *module.body[at:]])
