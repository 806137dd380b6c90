"""The TVMScript of templates, made into Python once: a function that calls TVM's builder, and is run at every use.

TVM's own parser reads the text of a function wherever it is used, and compiles every expression in it by itself: twenty
times the work. Here ``for``, ``if``, stores and bindings become calls of :class:`builder.Builder`, and what is closed
over stays closed over. Lines are those of the template, so Python's tracebacks tell where an error is:

    for r in T.parallel(x.R):           with _build.loop(T.parallel(x.R), 'r') as r:
        if r < last:                        with _build.branch(_build.compare('Lt', r, last)) as _branch:
            y[r, 0] = factor                    if _branch.taken:
                                                    with _branch.then():
                                                        _build.store(y, factor, (r, 0))

Templates speak a part of TVMScript: loops with one variable, ``if``, stores, ``x = T.alloc_buffer(..)``,
``x = T.meta_var(..)``, ``x: T.let = ..`` and calls. The IR is what TVM's parser makes of it; tests hold the two against
each other.
"""

import ast
import copy
import linecache
from collections.abc import Callable
from functools import cache
from types import CellType, CodeType, FunctionType

from .builder import Builder

_BUILD = "_build"
"""The name by which translated functions know the builder."""
_BUILDER = Builder()
_CODE: dict[tuple[str, str, int], CodeType] = {}


def translated(function: Callable[..., None]) -> Callable[..., None]:
    """A function of TVMScript as one of Python, which emits it into the kernel at work.

    Raises:
        SyntaxError: at the line of the template that is not TVMScript as templates speak it.
    """
    code = _translated(function.__code__)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_BUILD] = CellType(_BUILDER)
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@cache
def _functions(path: str) -> dict[tuple[str, int], ast.FunctionDef]:
    """The functions of a file by their name and the line that they begin at: that of the first decorator."""
    found = {}
    for node in ast.walk(ast.parse("".join(linecache.getlines(path)), path)):
        if isinstance(node, ast.FunctionDef):
            found[node.name, min([node.lineno, *(one.lineno for one in node.decorator_list)])] = node
    return found


def _translated(code: CodeType) -> CodeType:
    """The code of a function, translated; kept for its next use."""
    key = code.co_filename, code.co_name, code.co_firstlineno
    if key not in _CODE:
        node = _functions(code.co_filename)[code.co_name, code.co_firstlineno]
        node = _Translator(code.co_filename).function(node)
        # What it closes over are arguments of a function around it.
        around = ast.parse(f"def around({', '.join([*code.co_freevars, _BUILD])}): pass").body[0]
        assert isinstance(around, ast.FunctionDef)
        around.body = [node]
        module = ast.fix_missing_locations(ast.Module([around], []))
        _CODE[key] = _inner(_inner(compile(module, code.co_filename, "exec")))
    return _CODE[key]


def _inner(code: CodeType) -> CodeType:
    """The one function that a module or a function defines."""
    return next(one for one in code.co_consts if isinstance(one, CodeType))


class _Translator(ast.NodeTransformer):
    """Statements and expressions of TVMScript to those of Python; what it has no method for is refused."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.bound: set[str] = set()
        """Names of the scopes at work: TVMScript's last for a block, Python's for a function."""
        self.branches = 0

    def function(self, node: ast.FunctionDef) -> ast.FunctionDef:
        arguments = node.args
        self.bound = {one.arg for one in (*arguments.args, *arguments.kwonlyargs)}
        # A copy: fields differ from one Python to the next, and what fails halfway can be tried again.
        made = copy.deepcopy(node)
        made.body, made.decorator_list = self._block(made.body), []
        return made

    # --- statements

    def _block(self, statements: list[ast.stmt], *names: ast.expr) -> list[ast.stmt]:
        """Statements of a scope that begins with ``names``."""
        around, self.bound = self.bound, set(self.bound)
        for name in names:
            self._bind(name)
        found = [ast.copy_location(self.visit(one), one) for one in statements]
        self.bound = around
        return found

    def _bind(self, target: ast.expr) -> ast.Constant:
        """The name that is bound here, as text."""
        if not isinstance(target, ast.Name):
            raise self._error(target, "binds one name at a time")
        if target.id in self.bound:
            raise self._error(target, f"binds {target.id} twice")
        self.bound.add(target.id)
        return ast.Constant(target.id)

    def visit_For(self, node: ast.For) -> ast.stmt:
        if node.orelse:
            raise self._error(node.orelse[0], "has no else of a loop")
        frame = node.iter
        if isinstance(frame, ast.Call) and isinstance(frame.func, ast.Name) and frame.func.id == "range":
            frame = _call("range", *map(self.visit, frame.args), keywords=[self.visit(one) for one in frame.keywords])
        else:
            frame = self.visit(frame)
        body = self._block(node.body, node.target)
        assert isinstance(node.target, ast.Name)
        return _with(_call("loop", frame, ast.Constant(node.target.id)), node.target, body)

    def visit_If(self, node: ast.If) -> ast.stmt:
        # No two that are at work at once have one name.
        name = f"_branch_{self.branches}"
        self.branches += 1
        found: list[ast.stmt] = []
        for taken, enter, statements in (("taken", "then", node.body), ("otherwise", "otherwise_then", node.orelse)):
            if statements:
                inside = _with(ast.Call(_of(name, enter), [], []), None, self._block(statements))
                found.append(ast.If(_of(name, taken), [inside], []))
        return _with(_call("branch", self.visit(node.test)), ast.Name(name, ast.Store()), found)

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        if len(node.targets) != 1:
            raise self._error(node, "binds one name at a time")
        target, value = node.targets[0], self.visit(node.value)
        if isinstance(target, ast.Subscript):
            return ast.Expr(_call("store", self.visit(target.value), value, self.visit(target.slice)))
        return ast.Assign([target], _call("bind", value, self._bind(target)))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if ast.unparse(node.annotation) != "T.let" or node.value is None:
            raise self._error(node, "annotates with T.let alone")
        value = self.visit(node.value)
        return ast.Assign([node.target], _call("let", value, self._bind(node.target)))

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        return ast.Expr(_call("statement", self.visit(node.value)))

    def visit_Pass(self, node: ast.Pass) -> ast.stmt:
        return node

    # --- expressions

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if len(node.ops) != 1:
            raise self._error(node, "compares two values")
        operands = self.visit(node.left), self.visit(node.comparators[0])
        return _call("compare", ast.Constant(type(node.ops[0]).__name__), *operands)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        operand = self.visit(node.operand)
        return _call("negation", operand) if isinstance(node.op, ast.Not) else ast.UnaryOp(node.op, operand)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        return _call("join", ast.Constant(type(node.op).__name__), *(_later(self.visit(one)) for one in node.values))

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        return _call("choose", self.visit(node.test), *(_later(self.visit(one)) for one in (node.body, node.orelse)))

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        return node  # Python's own, in TVM's parser too

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, _AS_THEY_ARE):
            raise self._error(node, f"has no {type(node).__name__}")
        return super().generic_visit(node)

    def visit(self, node: ast.AST) -> ast.AST:
        found = super().visit(node)
        return ast.copy_location(found, node) if isinstance(node, ast.expr | ast.stmt) else found

    def _error(self, node: ast.AST, what: str) -> SyntaxError:
        line, column = getattr(node, "lineno", 0), getattr(node, "col_offset", 0) + 1
        text = linecache.getline(self.path, line)
        return SyntaxError(f"TVMScript of templates {what}", (self.path, line, column, text))


_AS_THEY_ARE = (
    *(ast.Name, ast.Attribute, ast.Constant, ast.Subscript, ast.Call, ast.keyword, ast.Tuple, ast.List, ast.BinOp),
    *(ast.expr_context, ast.operator),
)
"""Expressions that mean the same in Python; TVM's values overload its operators."""


def _of(name: str, attribute: str) -> ast.expr:
    return ast.Attribute(ast.Name(name, ast.Load()), attribute, ast.Load())


def _call(method: str, *arguments: ast.expr, keywords: list[ast.keyword] | None = None) -> ast.expr:
    """A call of the builder."""
    return ast.Call(_of(_BUILD, method), list(arguments), keywords or [])


def _later(value: ast.expr) -> ast.expr:
    """A value that is computed if it is asked for."""
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(nothing, value)


def _with(context: ast.expr, target: ast.expr | None, body: list[ast.stmt]) -> ast.stmt:
    return ast.With([ast.withitem(context, target)], body)
