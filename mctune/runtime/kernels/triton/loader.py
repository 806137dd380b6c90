"""Import the rendered modules of a Triton package."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from ...errors import KernelError
from ...manifest import CONTENTS, PACKAGE


def load_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, ModuleType]:
    """The modules of ``folder`` by operation; ``parts`` maps operations to file names.

    The folder is a package of its own, so that modules find each other by relative imports, and a module is imported
    once in a process, however the path to its folder is spelt.

    Raises:
        KernelError: if Triton or a file is missing, or a module cannot be imported.
    """
    package = _of_package(folder) or _package(folder.resolve())
    return {operation: _load(package, file) for operation, file in parts.items()}


def _of_package(folder: Path) -> ModuleType | None:
    """The emitted package's folder of kernels, whose modules come from what was verified."""
    if CONTENTS is None or folder != CONTENTS.root / "kernels":
        return None
    return importlib.import_module(f"{PACKAGE}.kernels")


def _package(folder: Path) -> ModuleType:
    """The folder as a package of a name that no other folder has."""
    name = f"_mctune_kernels_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return sys.modules[name]


def _load(package: ModuleType, file: str) -> ModuleType:
    name = f"{package.__name__}.{file.removesuffix('.py')}"
    if name in sys.modules:
        return sys.modules[name]
    path = Path(file)
    if package.__path__:
        path = Path(package.__path__[0]) / file
        if not path.is_file():
            raise KernelError(f"kernel module {path} is missing; emit the package again with `mctune emit`")
        # A folder that was read before may have got the file since.
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] == "triton":
            remedy = "pip install 'triton>=3.6,<3.10' (there are wheels for Linux)"
            raise KernelError(f"kernel module {file} needs Triton: {remedy}") from error
        raise KernelError(f"kernel module {path} cannot be imported: {error}") from error
    except SyntaxError as error:
        raise KernelError(f"kernel module {path} is not Python: {error}") from error
