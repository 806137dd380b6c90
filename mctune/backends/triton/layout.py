"""Take parameters and arguments out of definitions and calls, and lay out again the lines that they stood on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import libcst as cst

WIDTH = 120
_Item = TypeVar("_Item", cst.Param, cst.Arg)
_EMPTY = cst.Module([])


@dataclass(frozen=True)
class Signature:
    """The parameters of a function, in order, and those that it loses."""

    params: Sequence[str]
    gone: Set[str]


def without(function: cst.FunctionDef, signatures: Mapping[str, Signature]) -> cst.FunctionDef:
    """The function without the parameters that it loses, and without arguments for those that its callees lose."""
    gone = signatures[function.name.value].gone
    node = function.visit(_Remover(signatures))
    assert isinstance(node, cst.FunctionDef)
    return _signature(node, gone) if gone else node


def _signature(node: cst.FunctionDef, gone: Set[str]) -> cst.FunctionDef:
    old = node.params
    kept = [x for x in (*old.params, *old.kwonly_params) if x.name.value not in gone]
    everything = [*old.params, *old.kwonly_params]
    kept = _lay_out(everything, kept, old_first=node.whitespace_before_params, depth=0)
    names = {x.name.value for x in old.params}
    kwonly = [x for x in kept if x.name.value not in names]
    params = old.with_changes(
        params=[x for x in kept if x.name.value in names],
        kwonly_params=kwonly,
        star_arg=old.star_arg if kwonly or isinstance(old.star_arg, cst.Param) else cst.MaybeSentinel.DEFAULT,
    )
    space = node.whitespace_before_params if kept else cst.SimpleWhitespace("")
    return node.with_changes(
        params=params, whitespace_before_params=space, decorators=[_specialized(x, gone) for x in node.decorators]
    )


def _specialized(node: cst.Decorator, gone: Set[str]) -> cst.Decorator:
    """``@triton.jit(do_not_specialize=[...])`` without names that are gone."""
    if not isinstance(node.decorator, cst.Call):
        return node
    args = []
    for arg in node.decorator.args:
        if isinstance(arg.value, cst.List):
            texts = [x for x in arg.value.elements if isinstance(x.value, cst.SimpleString)]
            kept = [x for x in texts if x.value.evaluated_value not in gone]  # type: ignore[attr-defined]
            if len(texts) == len(arg.value.elements) > len(kept):
                if not kept:
                    continue
                kept[-1] = kept[-1].with_changes(comma=texts[-1].comma)
                arg = arg.with_changes(value=arg.value.with_changes(elements=kept))
        args.append(arg)
    if not args:
        return node.with_changes(decorator=node.decorator.func)
    args[-1] = args[-1].with_changes(comma=node.decorator.args[-1].comma)
    return node.with_changes(decorator=node.decorator.with_changes(args=args))


class _Remover(cst.CSTTransformer):
    """Takes arguments out of calls."""

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        super().__init__()
        self.signatures = signatures
        self.depth = 0

    def visit_IndentedBlock(self, node: cst.IndentedBlock) -> None:
        self.depth += 1

    def leave_IndentedBlock(self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock) -> cst.BaseSuite:
        self.depth -= 1
        return updated_node

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        function = updated_node.func
        if isinstance(function, cst.Subscript):
            function = function.value
        signature = self.signatures.get(function.value) if isinstance(function, cst.Name) else None
        if signature is None:
            return updated_node
        places = zip(updated_node.args, [*signature.params, *[""] * len(updated_node.args)], strict=False)
        kept = [x for x, name in places if (x.keyword.value if x.keyword else name) not in signature.gone]
        if len(kept) == len(updated_node.args):
            return updated_node
        args = _lay_out(updated_node.args, kept, old_first=updated_node.whitespace_before_args, depth=self.depth)
        space = updated_node.whitespace_before_args if args else cst.SimpleWhitespace("")
        return updated_node.with_changes(args=args, whitespace_before_args=space)


def _lay_out(
    old: Sequence[_Item], kept: Sequence[_Item], old_first: cst.BaseParenthesizableWhitespace, depth: int
) -> list[_Item]:
    """What is kept, on lines like those it stood on: one, one an item, or filled ones."""
    items = list(kept)
    if not items or len(items) == len(old):
        return items
    last = old[-1]
    breaks = [isinstance(x.comma, cst.Comma) and _broken(x.comma.whitespace_after) for x in old[:-1]]
    if _broken(old_first) and not all(breaks):
        items = _fill(items, old_first, depth)
    items[-1] = _ended(items[-1], last)
    return items


def _ended(item: _Item, last: _Item) -> _Item:
    """An item that ends its list as ``last`` did."""
    changes: dict[str, object] = {"comma": last.comma}
    if isinstance(item, cst.Arg) and isinstance(last, cst.Arg):
        changes["whitespace_after_arg"] = last.whitespace_after_arg
    if isinstance(item, cst.Param) and isinstance(last, cst.Param):
        changes["whitespace_after_param"] = last.whitespace_after_param
    return item.with_changes(**changes)


def _broken(space: cst.BaseParenthesizableWhitespace) -> bool:
    return isinstance(space, cst.ParenthesizedWhitespace)


def _fill(items: list[_Item], newline: cst.BaseParenthesizableWhitespace, depth: int) -> list[_Item]:
    """Items on lines of at most WIDTH."""
    indent = 4 * (depth + 1)
    column = indent
    filled = []
    sizes: list[int] = [len(_EMPTY.code_for_node(x.with_changes(comma=cst.MaybeSentinel.DEFAULT))) + 1 for x in items]
    for item, size, following in zip(items, sizes, [*sizes[1:], 0], strict=True):
        column += size
        fits = column + 1 + following <= WIDTH
        space = cst.SimpleWhitespace(" ") if fits else newline
        column = column + 1 if fits else indent
        filled.append(item.with_changes(comma=cst.Comma(whitespace_after=space)))
    return filled
