"""Where the templates and search spaces are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

from mctune.core.errors import DeviceError

_PACKAGE = Path(__file__).resolve().parent.parent


def templates_dir() -> Path:
    """The folder with the templates of each backend.

    Raises:
        DeviceError: if the installation has none.

    Examples:
        >>> (templates_dir() / "triton").is_dir()
        True
    """
    return _data_dir("templates", _PACKAGE)


def search_spaces_dir() -> Path:
    """The folder with ``targets/*.toml``, ``workloads/*.toml`` and the search spaces of each backend.

    Raises:
        DeviceError: if the installation has none.
    """
    return _data_dir("search_spaces", _PACKAGE)


def results_dir() -> Path | None:
    """The folder of published results beside the package, which a checkout has and a wheel has not."""
    folder = _PACKAGE.parent / "results"
    return folder if folder.is_dir() else None


def _data_dir(name: str, package: Path) -> Path:
    """``package/_data/name`` (a wheel), else the sibling of ``package`` (a checkout)."""
    packaged, beside = package / "_data" / name, package.parent / name
    for folder in (packaged, beside):
        if folder.is_dir():
            return folder
    raise DeviceError(
        f"mctune's {name} are neither at {packaged} (an installed wheel) nor at {beside} (a checkout): this "
        "installation is incomplete; install mctune again"
    )
