"""Fold the flags of one function of a template: constants in place of names, and only the branches that are taken."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import libcst as cst
from libcst import matchers

Flag: TypeAlias = bool | str
Statement: TypeAlias = cst.SimpleStatementLine | cst.BaseCompoundStatement
_COMPILE_TIME = (cst.Is, cst.IsNot)
_EMPTY = cst.Module([])


class CannotFold(ValueError):
    """A template uses a flag in a shape that rendering does not fold."""


def code(node: cst.CSTNode) -> str:
    """The source of a node, on its own."""
    return _EMPTY.code_for_node(node).strip()


class Names(cst.CSTVisitor):
    """The names that a node reads or binds; not those of attributes and of keyword arguments."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_Name(self, node: cst.Name) -> None:
        self.found.add(node.value)

    def visit_Attribute(self, node: cst.Attribute) -> bool:
        node.value.visit(self)
        return False

    def visit_Arg(self, node: cst.Arg) -> bool:
        node.value.visit(self)
        return False


def names(*nodes: cst.CSTNode) -> set[str]:
    """The names that nodes read or bind."""
    visitor = Names()
    for node in nodes:
        node.visit(visitor)
    return visitor.found


def constant(node: cst.CSTNode) -> tuple[bool, object]:
    """Whether a node is a constant that flags are compared with, and which."""
    if isinstance(node, cst.Name) and node.value in ("True", "False"):
        return True, node.value == "True"
    if isinstance(node, cst.SimpleString | cst.Integer):
        return True, ast.literal_eval(node.value)
    if isinstance(node, cst.Tuple | cst.List | cst.Set):
        parts = [constant(element.value) for element in node.elements]
        return all(known for known, _ in parts), tuple(value for _, value in parts)
    return False, None


def literal(value: Flag) -> cst.BaseExpression:
    """The expression that a flag becomes."""
    return cst.SimpleString(json.dumps(value)) if isinstance(value, str) else cst.Name(str(value))


def fold_function(function: cst.FunctionDef, flags: Mapping[str, Flag], jit: bool) -> cst.FunctionDef:
    """The function with its flags folded; its parameters stay.

    Raises:
        CannotFold: naming the function and the expression.
    """
    fold = _Fold(function, flags, jit)
    return function.with_changes(body=fold.body(function.body))


_COMPARE: Mapping[type[cst.BaseCompOp], Callable[..., bool]] = {
    cst.Equal: lambda a, b: a == b,
    cst.NotEqual: lambda a, b: a != b,
    cst.In: lambda a, b: a in b,
    cst.NotIn: lambda a, b: a not in b,
    cst.Is: lambda a, b: a is b,
    cst.IsNot: lambda a, b: a is not b,
}


class _Fold(cst.CSTTransformer):
    """Folds expressions when it visits them, and statements by :meth:`block`."""

    def __init__(self, function: cst.FunctionDef, flags: Mapping[str, Flag], jit: bool) -> None:
        super().__init__()
        self.function, self.flags, self.jit = function, flags, jit

    def fail(self, node: cst.CSTNode, why: str) -> CannotFold:
        return CannotFold(f"{self.function.name.value}: `{code(node)}` {why}")

    def flagged(self, node: cst.CSTNode) -> bool:
        return not self.flags.keys().isdisjoint(names(node))

    def expression(self, node: cst.CSTNodeT) -> cst.CSTNodeT:
        """Any node without statements."""
        folded = node.visit(self)
        assert isinstance(folded, type(node)) or isinstance(node, cst.BaseExpression)
        return folded  # type: ignore[return-value]

    def test(self, node: cst.BaseExpression) -> bool | cst.BaseExpression:
        """What an ``if`` tests, as far as it is known.

        Raises:
            CannotFold: if a flag in it is not; and, in a kernel, if a value of run time is in it too.
        """
        if not self.flagged(node):
            return node
        value = self.known(node)
        if self.jit and not isinstance(value, bool) and not _compile_time(value):
            raise self.fail(node, "mixes a flag with a value of run time; test the flag in an `if` of its own")
        return value

    def known(self, node: cst.BaseExpression) -> bool | cst.BaseExpression:
        if not self.flagged(node):
            return node
        if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Not):
            inner = self.known(node.expression)
            return not inner if isinstance(inner, bool) else node.with_changes(expression=inner)
        if isinstance(node, cst.BooleanOperation):
            return self.boolean(node, self.known(node.left), self.known(node.right))
        certain, value = constant(self.expression(node))
        if not certain:
            raise self.fail(node, "does not fold: compare a flag with constants, by ==, !=, in or not in")
        return bool(value)

    def boolean(
        self, node: cst.BooleanOperation, left: bool | cst.BaseExpression, right: bool | cst.BaseExpression
    ) -> bool | cst.BaseExpression:
        """``left and right``, or ``left or right``, for their truth alone."""
        decides = isinstance(node.operator, cst.Or)
        if isinstance(left, bool):
            return left if left is decides else right if isinstance(right, bool) else _in_parens(node, right)
        if isinstance(right, bool):
            if right is not decides:
                return _in_parens(node, left)
            if _calls(left):
                raise self.fail(node, "does not fold: put the flag first")
            return right
        return node.with_changes(left=left, right=right)

    # Expressions

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return literal(self.flags[original_node.value]) if original_node.value in self.flags else updated_node

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        return updated_node.with_changes(keyword=original_node.keyword)

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> cst.BaseExpression:
        return updated_node.with_changes(attr=original_node.attr)

    def visit_FormattedString(self, node: cst.FormattedString) -> None:
        if self.flagged(node):
            raise self.fail(node, "does not fold: a flag in a formatted string")

    def visit_Lambda(self, node: cst.Lambda) -> None:
        if not self.flags.keys().isdisjoint(param.name.value for param in node.params.params):
            raise self.fail(node, "hides a flag")

    def leave_Comparison(self, original_node: cst.Comparison, updated_node: cst.Comparison) -> cst.BaseExpression:
        if len(updated_node.comparisons) == 1 and self.flagged(original_node):
            target = updated_node.comparisons[0]
            (left_known, left), (right_known, right) = constant(updated_node.left), constant(target.comparator)
            compare = _COMPARE.get(type(target.operator))
            if left_known and right_known and compare is not None:
                return literal(compare(left, right))
        return updated_node

    def leave_UnaryOperation(
        self, original_node: cst.UnaryOperation, updated_node: cst.UnaryOperation
    ) -> cst.BaseExpression:
        certain, value = constant(updated_node.expression)
        folds = certain and isinstance(updated_node.operator, cst.Not) and self.flagged(original_node)
        return literal(not value) if folds else updated_node

    def leave_BooleanOperation(
        self, original_node: cst.BooleanOperation, updated_node: cst.BooleanOperation
    ) -> cst.BaseExpression:
        certain, value = constant(updated_node.left)
        if not certain or not self.flagged(original_node):
            return updated_node
        stays = bool(value) is isinstance(updated_node.operator, cst.Or)
        return _in_parens(updated_node, updated_node.left if stays else updated_node.right)

    def leave_IfExp(self, original_node: cst.IfExp, updated_node: cst.IfExp) -> cst.BaseExpression:
        value = self.test(original_node.test)
        if isinstance(value, bool):
            return _in_parens(updated_node, updated_node.body if value else updated_node.orelse)
        return updated_node.with_changes(test=value)

    # Statements

    def body(self, suite: cst.BaseSuite) -> cst.BaseSuite:
        """A suite that stays one: ``pass`` where nothing is left of it."""
        statements, footer = self.block(suite)
        if not statements:
            statements = [cst.SimpleStatementLine([cst.Pass()])]
        if isinstance(suite, cst.IndentedBlock):
            return suite.with_changes(body=statements, footer=footer)
        return cst.IndentedBlock(body=statements, footer=footer)

    def block(self, suite: cst.BaseSuite) -> tuple[list[Statement], list[cst.EmptyLine]]:
        """The statements of a suite, and the comments after the last of them."""
        if isinstance(suite, cst.SimpleStatementSuite):
            line = cst.SimpleStatementLine(suite.body, trailing_whitespace=suite.trailing_whitespace)
            suite = cst.IndentedBlock([line])
        assert isinstance(suite, cst.IndentedBlock)
        done: list[Statement] = []
        comments: list[cst.EmptyLine] = []
        for statement in suite.body:
            new, footer = self.statement(statement)
            if new and comments:
                new[0] = _after(comments, new[0])
                comments = []
            done += new
            comments += footer
            if done and _leaves(done[-1]):
                # The branch that was taken returns: nothing after it runs.
                break
        if done:
            done[0] = _first_in_block(done[0])
        return done, [*comments, *suite.footer]

    def statement(self, node: cst.BaseStatement) -> tuple[list[Statement], list[cst.EmptyLine]]:
        """What remains of a statement: nothing, the statement, or those of a branch; and the comments after them."""
        if isinstance(node, cst.If):
            return self.branch(node)
        if isinstance(node, cst.For):
            parts = {"target": self.expression(node.target), "iter": self.expression(node.iter)}
            orelse = None if node.orelse is None else self.orelse(node.orelse)
            return [node.with_changes(**parts, body=self.body(node.body), orelse=orelse)], []
        if isinstance(node, cst.While):
            if self.flagged(node.test):
                raise self.fail(node.test, "does not fold: a flag in the test of a loop")
            return [node.with_changes(body=self.body(node.body))], []
        if isinstance(node, cst.With):
            return [node.with_changes(items=[self.expression(x) for x in node.items], body=self.body(node.body))], []
        if isinstance(node, cst.SimpleStatementLine):
            if len(node.body) == 1 and isinstance(node.body[0], cst.Assert) and self.flagged(node.body[0].test):
                if self.known(node.body[0].test) is True:
                    return [], []
            return [node.with_changes(body=[self.expression(part) for part in node.body])], []
        if self.flagged(node):
            raise self.fail(node, "does not fold: a flag in such a statement")
        assert isinstance(node, cst.BaseCompoundStatement)
        return [node], []

    def branch(self, node: cst.If) -> tuple[list[Statement], list[cst.EmptyLine]]:
        value = self.test(node.test)
        if value is True:
            return self.splice(node.leading_lines, node.body)
        if value is False:
            # The comment above belongs to the branch that is removed.
            blank = [line for line in node.leading_lines if line.comment is None][:1]
            if isinstance(node.orelse, cst.If):
                return self.branch(node.orelse.with_changes(leading_lines=[*blank, *node.orelse.leading_lines]))
            if node.orelse is None:
                return [], []
            return self.splice([*blank, *node.orelse.leading_lines], node.orelse.body)
        test = node.test if isinstance(value, bool) else self.expression(value)
        statements, footer = self.block(node.body)
        orelse = None if node.orelse is None else self.orelse(node.orelse)
        if not statements and orelse is None and not _calls(test):
            return [], footer
        changed = node.with_changes(test=test, body=self.body(node.body), orelse=orelse)
        return [changed.with_changes(whitespace_before_test=cst.SimpleWhitespace(" "))], []

    def orelse(self, node: cst.If | cst.Else) -> cst.If | cst.Else | None:
        """The rest of an ``if`` whose test is not known."""
        if isinstance(node, cst.Else):
            statements, _ = self.block(node.body)
            return node.with_changes(body=self.body(node.body)) if statements else None
        value = self.test(node.test)
        if value is False:
            return None if node.orelse is None else self.orelse(node.orelse)
        if value is True:
            return self.orelse(cst.Else(node.body, leading_lines=node.leading_lines))
        assert not isinstance(value, bool)
        rest = None if node.orelse is None else self.orelse(node.orelse)
        return node.with_changes(test=self.expression(value), body=self.body(node.body), orelse=rest)

    def splice(
        self, lines: Sequence[cst.EmptyLine], suite: cst.BaseSuite
    ) -> tuple[list[Statement], list[cst.EmptyLine]]:
        """A suite in place of the ``if`` that it belongs to."""
        statements, footer = self.block(suite)
        if isinstance(suite, cst.IndentedBlock) and suite.header.comment is not None:
            lines = [*lines, cst.EmptyLine(comment=suite.header.comment)]
        if statements:
            statements[0] = _after(lines, statements[0])
        return statements, footer


def _after(lines: Iterable[cst.EmptyLine], statement: Statement) -> Statement:
    """A statement with comments above it."""
    return statement.with_changes(leading_lines=[*lines, *statement.leading_lines])


def _first_in_block(statement: Statement) -> Statement:
    """A statement without blank lines above it."""
    lines = list(statement.leading_lines)
    while lines and lines[0].comment is None:
        del lines[0]
    return statement.with_changes(leading_lines=lines)


def _leaves(statement: Statement) -> bool:
    """Whether the code after a statement never runs."""
    last = statement.body[-1] if isinstance(statement, cst.SimpleStatementLine) else None
    return isinstance(last, cst.Return | cst.Raise)


def _in_parens(outer: cst.BaseExpression, inner: cst.BaseExpression) -> cst.BaseExpression:
    """``inner`` in place of ``outer``, inside its parentheses where it may need them."""
    atom = isinstance(inner, cst.Name | cst.SimpleString | cst.Integer | cst.Float | cst.Call | cst.Attribute)
    if atom or not outer.lpar or inner.lpar:
        return inner
    return inner.with_changes(lpar=outer.lpar, rpar=outer.rpar)


def _calls(node: cst.BaseExpression) -> bool:
    """Whether evaluating an expression may do more than give a value."""
    return bool(matchers.findall(node, matchers.Call()))


def _compile_time(node: cst.BaseExpression) -> bool:
    """Whether Triton knows the truth of a test as it compiles: ``x is None`` and comparisons of constexprs."""
    if isinstance(node, cst.UnaryOperation):
        return _compile_time(node.expression)
    if isinstance(node, cst.BooleanOperation | cst.BinaryOperation):
        return _compile_time(node.left) and _compile_time(node.right)
    if isinstance(node, cst.Comparison):
        if all(isinstance(target.operator, _COMPILE_TIME) for target in node.comparisons):
            return True
        return all(_compile_time(x) for x in (node.left, *(target.comparator for target in node.comparisons)))
    return isinstance(node, cst.Integer | cst.SimpleString) or (isinstance(node, cst.Name) and node.value.isupper())
