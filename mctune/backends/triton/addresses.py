"""Which bytes of shared memory an address of PTX may be, or the descriptor of an operand of ``wgmma``.

A value is a range of whole numbers over all threads of a block, with the bits that may be set in any of them. What
comes from arguments or global memory is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

MEMORY = "global_smem"
"""Triton's name for a block's shared memory."""
_ALL = (1 << 32) - 1
_LOW = (1 << 14) - 1
"""The bits of a descriptor that are an address, in units of 16 bytes."""


@dataclass(frozen=True)
class Value:
    """Numbers from ``low`` to ``high`` whose bits are all in ``bits``.

    Attributes:
        where: "" for a plain number; ``address``: bytes from the begin of shared memory; ``descriptor``: the same, of
            an operand whose layout is in ``layout``, the descriptor's other bits.
    """

    low: int
    high: int
    bits: int
    where: str = ""
    layout: int = 0

    @property
    def exact(self) -> bool:
        """Whether it is one number, the same in all threads."""
        return self.low == self.high


Values = Mapping[str, "Value | None"]
"""By register; a register that is missing, or ``None``, is unknown."""


def number(value: int) -> Value:
    """A constant."""
    return Value(value, value, value if value >= 0 else _ALL)


def upto(high: int) -> Value:
    """Any number from 0 to ``high``."""
    return Value(0, high, (1 << high.bit_length()) - 1)


def operand(text: str, values: Values, threads: int) -> Value | None:
    """An operand: a register, a number, or the name of shared memory."""
    text = text.strip()
    if text == "%tid.x":
        return upto(threads - 1)
    if text == MEMORY:
        return Value(0, 0, 0, "address")
    if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
        return number(int(text, 0))
    return values.get(text)


def address(text: str, values: Values, threads: int) -> Value | None:
    """The address in the brackets of a load or store: an operand, and possibly an offset."""
    base, _, offset = text.partition("+")
    found = operand(base, values, threads)
    return _add(found, number(int(offset or "0", 0))) if found is not None else None


def result(opcode: str, given: list[Value | None]) -> Value | None:
    """What an instruction computes from its operands, where that is known."""
    name, _, kind = opcode.partition(".")
    if name in ("mov", "cvt", "shfl"):  # shfl gives another lane's value, which is in the same range
        return given[0]
    if name == "selp" and len(given) == 3:
        chosen = given[2]
        return _either(given[0], given[1]) if chosen is None or not chosen.exact else given[0 if chosen.low else 1]
    if name == "bfe" and len(given) == 3 and given[1] is not None and given[2] is not None:
        return _field(given[0], given[1].low, given[2].low) if kind.startswith("u") else None
    if len(given) != 2:
        return None
    a, b = given
    if name == "and":
        return _and(a, b)
    if b is None:
        return None
    if name == "shr":
        return _field(a, b.low, 32 - b.low) if b.exact else None
    if a is None:
        return None
    if name == "setp":
        return _compared(kind.partition(".")[0], a, b)
    return _TWO[name](a, b) if name in _TWO else None


def _add(a: Value, b: Value) -> Value | None:
    if b.where:
        a, b = b, a
    if b.where:
        return None
    if a.where == "descriptor":
        return _advanced(a, b)
    low, high = a.low + b.low, a.high + b.high
    if low < 0:
        return replace(a, low=low, high=high, bits=_ALL)
    # Without common bits there is no carry, so set bits stay where they are.
    bits = a.bits | b.bits if a.bits & b.bits == 0 else (1 << high.bit_length()) - 1
    return replace(a, low=low, high=min(high, bits), bits=bits)


def _advanced(a: Value, b: Value) -> Value | None:
    """A descriptor plus a constant, which may have all of its bits, or so many times 16 bytes."""
    if not b.exact and not 0 <= b.low <= b.high <= _LOW:
        return None
    first, last = (b.low & _LOW) * 16, (b.high & _LOW) * 16
    return replace(
        a, low=a.low + first, high=a.high + last, bits=_ALL, layout=a.layout | b.low & ~_LOW if b.exact else a.layout
    )


def _or(a: Value, b: Value) -> Value | None:
    if "descriptor" in (a.where, b.where):
        return _add(a, b)
    if a.exact and b.exact and not a.where and not b.where:
        return number(a.low | b.low)
    return _united(a, b)


def _xor(a: Value, b: Value) -> Value | None:
    if a.exact and b.exact and not a.where and not b.where:
        return number(a.low ^ b.low)
    return _united(a, b)


def _united(a: Value, b: Value) -> Value | None:
    if a.where or b.where or a.low < 0 or b.low < 0:
        return None
    return Value(0, a.bits | b.bits, a.bits | b.bits)


def _and(a: Value | None, b: Value | None) -> Value | None:
    for one, other in ((a, b), (b, a)):
        if one is not None and one.where == "descriptor":
            return one if other is not None and other.exact and other.low & _LOW == _LOW else None
    known = [value for value in (a, b) if value is not None and not value.where and value.low >= 0]
    if not known or any(value is not None and value.where for value in (a, b)):
        return None
    if len(known) == 2 and known[0].exact and known[1].exact:
        return number(known[0].low & known[1].low)
    bits = known[0].bits & known[-1].bits
    return Value(0, min(bits, *(value.high for value in known)), bits)


def _shl(a: Value, b: Value) -> Value | None:
    if a.where or not b.exact or a.high << b.low > _ALL:
        return None
    bits = a.bits << b.low & _ALL if a.low >= 0 else _ALL
    return Value(a.low << b.low, a.high << b.low, bits)


def _sub(a: Value, b: Value) -> Value | None:
    return None if b.where or a.where == "descriptor" else _add(a, Value(-b.high, -b.low, _ALL))


def _mul(a: Value, b: Value) -> Value | None:
    if a.where or b.where or a.low < 0 or b.low < 0 or a.high * b.high > _ALL:
        return None
    return number(a.low * b.low) if a.exact and b.exact else replace(upto(a.high * b.high), low=a.low * b.low)


def _field(a: Value | None, begin: int, count: int) -> Value | None:
    """``count`` bits from bit ``begin`` on; of an address from bit 4 on, the operand's descriptor."""
    bits = (1 << count) - 1
    if a is None or (a.low < 0 and not a.where):
        return Value(0, bits, bits)
    if a.where == "address":
        return replace(a, where="descriptor") if begin == 4 else None
    if a.where:
        return None
    if a.exact:
        return number(a.low >> begin & bits)
    kept = a.bits >> begin & bits
    return Value(0, min(kept, a.high >> begin), kept)


def _either(a: Value | None, b: Value | None) -> Value | None:
    if a is None or b is None or (a.where, a.layout) != (b.where, b.layout):
        return None
    return replace(a, low=min(a.low, b.low), high=max(a.high, b.high), bits=a.bits | b.bits)


def _compared(how: str, a: Value, b: Value) -> Value | None:
    """1 or 0, where all numbers that these may be agree."""
    if a.where or b.where:
        return None
    least = {"lt": a.high < b.low, "le": a.high <= b.low, "gt": a.low > b.high, "ge": a.low >= b.high}
    most = {"lt": a.low >= b.high, "le": a.low > b.high, "gt": a.high <= b.low, "ge": a.high < b.low}
    same, apart = a.exact and b.exact and a.low == b.low, a.high < b.low or a.low > b.high
    least |= {"eq": same, "ne": apart}
    most |= {"eq": apart, "ne": same}
    return number(1) if least.get(how) else number(0) if most.get(how) else None


_TWO: dict[str, Callable[[Value, Value], Value | None]] = {
    "add": _add, "sub": _sub, "mul": _mul, "or": _or, "xor": _xor, "shl": _shl,
}  # fmt: skip
