"""The C compiler of the machine."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence

from ...errors import KernelError


def c_compiler(variables: Sequence[str], programs: Sequence[str]) -> list[str]:
    """The words of its command: of the first variable that is set, split as a shell does, else the first program found.

    Raises:
        KernelError: if there is no such program.
    """
    for name in variables:
        text = os.environ.get(name, "").strip()
        if not text:
            continue
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise KernelError(f"{name}={text!r} is not a command ({error}); set it to a C compiler") from None
        if words and shutil.which(words[0]) is None:
            raise KernelError(f"{name}={text!r}: there is no program {words[0]!r}; set it to a C compiler, or unset it")
        if words:
            return words
    found = next((path for path in map(shutil.which, programs) if path is not None), None)
    if found is None:
        raise KernelError("there is no C compiler; install gcc (for example `apt-get install g++`)")
    return [found]
