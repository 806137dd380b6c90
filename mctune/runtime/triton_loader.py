"""Import the rendered modules of a Triton package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from .tvm_loader import KernelError


def load_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, ModuleType]:
    """The modules of ``folder`` by operation; ``parts`` maps operations to file names.

    The folder is a package of its own, so that modules find each other by relative imports.

    Raises:
        KernelError: if Triton or a file is missing.
    """
    folder = folder.resolve()
    name = f"_mctune_kernels_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    loaded = {}
    for operation, file in parts.items():
        try:
            loaded[operation] = importlib.import_module(f"{name}.{file.removesuffix('.py')}")
        except ImportError as error:
            raise KernelError(f"{folder / file} cannot be imported: {error}") from error
    return loaded
