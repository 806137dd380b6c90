"""The CUDA C that ships, as C++ for a CPU: the same statements, with what hardware does put in the hands of a shim."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from mctune.core.errors import MctuneError

_HELPER = re.compile(r"^__forceinline__ __device__ ([\w ]+?) (\w+)\(", re.MULTILINE)
_ASM = re.compile(r'\basm(?: volatile)?\("([^"]*)"')
_KERNEL = re.compile(r'^extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\) \{', re.MULTILINE)
_POOL = re.compile(r"extern __shared__ __align__\(\d+\) uchar (\w+)\[\];")
_VECTOR = re.compile(r"\*\((uint[24]|float[24]|int[24])\*\)\(")
_TYPES = re.compile(r"^typedef .* uint\d+_t;\n", re.MULTILINE)


def on_cpu(text: str) -> str:
    """C++ of the kernels of ``text``, to be compiled with ``device.h`` beside it.

    Raises:
        MctuneError: for an instruction that the shim does not know.
    """
    helpers = [match[2] for match in _HELPER.finditer(text)]
    text = _TYPES.sub("", text)  # <cstdint> has them
    text = _POOL.sub(r"uchar* const \1 = device::shared_memory;", text)
    text = _assembly(text)
    for name in helpers:
        # Whoever meets has come to the same line of the kernel.
        text = re.sub(rf"\b{name}\(\)(?! \{{)", f"{name}(__LINE__)", text)
        text = re.sub(rf"(?<!\w){name}\((?!__LINE__)", f"{name}(__LINE__, ", text)
    for kind, name in [(match[1], match[2]) for match in _HELPER.finditer(text)]:
        head = f"__forceinline__ __device__ {kind} {name}("
        text = text.replace(f"{head}__LINE__, ) {{", f"{head}int mctune_line) {{")
        text = text.replace(f"{head}__LINE__) {{", f"{head}int mctune_line) {{")
        text = text.replace(f"{head}__LINE__, ", f"{head}int mctune_line, ")
    text = _vectors(text).replace("return __cvta_generic_to_shared(p)", "return device::shared_offset(mctune_line, p)")
    entries = [_entry(match) for match in _KERNEL.finditer(text)]
    table = ",\n".join(f'    {{"{name}", call_{name}, {threads}}}' for threads, name, _ in entries)
    calls = "\n".join(call for _, _, call in entries)
    return (
        f'#include "device.h"\n{text}\n{calls}\n'
        f'extern "C" const device::Entry mctune_entries[] = {{\n{table},\n    {{nullptr, nullptr, 0}}\n}};\n'
    )


def _entry(match: re.Match[str]) -> tuple[int, str, str]:
    """Threads, name, and a function that calls the kernel with an array of pointers to its arguments."""
    values = []
    for number, text in enumerate(match[3].split(",")):
        kind = text.replace("__restrict__", "").strip().rpartition(" ")[0].strip()
        values.append(f"*static_cast<{kind}*>(values[{number}])")
    call = f"static void call_{match[2]}(void** values) {{ {match[2]}({', '.join(values)}); }}"
    return int(match[1]), match[2], call


def _assembly(text: str) -> str:
    """Every ``asm`` statement becomes a call of what the shim has for its instruction."""
    parts, at = [], 0
    for match in _ASM.finditer(text):
        end = _closing(text, match.start() + text[match.start() :].index("("))
        parts += [text[at : match.start()], _call(match[1], text[match.end() : end])]
        at = end + 1
    return "".join([*parts, text[at:]])


def _closing(text: str, begin: int) -> int:
    """The place of the parenthesis that closes the one at ``begin``."""
    depth = 0
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise MctuneError("a source of CUDA C ends within parentheses")


def _call(template: str, rest: str) -> str:
    """A call for one statement; ``rest``: its operands."""
    outputs, inputs, *_ = [*_sections(rest), "", ""]
    names = [_operands(section) for section in (outputs, inputs)]
    code = template.replace("\\n", " ").replace("\\t", " ").strip().rstrip(";")
    for pattern, write in _INSTRUCTIONS:
        if found := re.fullmatch(pattern, code):
            return write(found, *names)
    raise MctuneError(f"kernels run on a CPU without {code!r}: mctune/verify/cuda_cpu has no such instruction")


def _sections(rest: str) -> Iterator[str]:
    """What stands between the colons of an ``asm`` statement, those of strings apart."""
    quoted, part = False, ""
    for letter in rest.strip().removeprefix(":"):
        quoted ^= letter == '"'
        if letter == ":" and not quoted:
            yield part
            part = ""
        else:
            part += letter
    yield part


def _operands(section: str) -> list[str]:
    return re.findall(r'"[^"]*"\((.*?)\)(?=,|\s*$)', section.strip())


def _arrays(a: list[str], b: list[str], c: list[str]) -> str:
    return (
        f"const uint32_t a[] = {{{', '.join(a)}}}, b[] = {{{', '.join(b)}}}; const float c[] = {{{', '.join(c)}}}; "
        f"float d[{len(c)}]; "
    )


def _back(out: list[str], name: str) -> str:
    return " ".join(f"{one} = {name}[{i}];" for i, one in enumerate(out))


def _mma16(found: re.Match[str], out: list[str], given: list[str]) -> str:
    depth, kind = int(found[1]), found[2]
    arrays = _arrays(given[: depth // 4], given[depth // 4 : -4], given[-4:])
    return f"{arrays} device::multiply_16x8(mctune_line, device::Kind::{kind}, {depth}, d, a, b, c); {_back(out, 'd')}"


def _mma8(found: re.Match[str], out: list[str], given: list[str]) -> str:
    a_columns, b_columns = (str(text == "col").lower() for text in (found[1], found[2]))
    arrays = _arrays(given[:2], given[2:4], given[4:])
    return f"{arrays} device::multiply_8x8(mctune_line, {a_columns}, {b_columns}, d, a, b, c); {_back(out, 'd')}"


def _ldmatrix(found: re.Match[str], out: list[str], given: list[str]) -> str:
    transposed, count = str(found[2] is not None).lower(), int(found[1])
    call = f"device::load_matrices(mctune_line, {count}, {transposed}, words, {given[0]})"
    return f"uint32_t words[4]; {call}; {_back(out, 'words')}"


def _converted(function: str) -> Callable[[re.Match[str], list[str], list[str]], str]:
    return lambda found, out, given: f"{out[0]} = device::{function}({given[0]})"


_INSTRUCTIONS: tuple[tuple[str, Callable[[re.Match[str], list[str], list[str]], str]], ...] = (
    (r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16|bf16)\.\2\.f32 .*", _mma16),
    (r"mma\.sync\.aligned\.m8n8k4\.(row|col)\.(row|col)\.f32\.f16\.f16\.f32 .*", _mma8),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x(\d)(\.trans)?\.shared\.b16 .*", _ldmatrix),
    (r"cvt\.f32\.f16 %0, %1", _converted("half_to_float")),
    (r"cvt\.rn\.f16\.f32 %0, %1", _converted("float_to_half")),
    (r"cvt\.rn\.bf16\.f32 %0, %1", _converted("float_to_bfloat")),
    (
        r"cp\.async\.c[ag]\.shared\.global \[%0\], \[%1\], (\d+)",
        lambda found, _, given: f"device::copy_later(mctune_line, {given[0]}, {given[1]}, {found[1]}, {found[1]})",
    ),
    (
        r"cp\.async\.c[ag]\.shared\.global \[%0\], \[%1\], (\d+), %2",
        lambda found, _, given: f"device::copy_later(mctune_line, {given[0]}, {given[1]}, {found[1]}, {given[2]})",
    ),
    (r"// .*", lambda *_: "(void)0"),
    (r"cp\.async\.commit_group", lambda *_: "device::commit_copies(mctune_line)"),
    (r"cp\.async\.wait_all", lambda *_: "device::commit_copies(mctune_line), device::wait_copies(mctune_line, 0)"),
    (r"cp\.async\.wait_group (\d+)", lambda found, *_: f"device::wait_copies(mctune_line, {found[1]})"),
)
"""Instructions by pattern, and the calls that stand for them: of what is found, the outputs and the inputs."""


def _vectors(text: str) -> str:
    """Accesses of vectors look at their alignment first."""
    parts, at = [], 0
    for match in _VECTOR.finditer(text):
        end = _closing(text, match.end() - 1)
        parts += [text[at : match.start()], f"device::vector_at<{match[1]}>(__LINE__, {text[match.end() : end]})"]
        at = end + 1
    return "".join([*parts, text[at:]])
