"""The errors that the runtime raises on purpose. Each names the offender, the limit and the remedy."""

from __future__ import annotations

from .manifest import PackageError as PackageError


class ArgumentError(ValueError):
    """The arguments of a call contradict each other, or one is out of range."""


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot serve this call."""


class KernelError(RuntimeError):
    """A compiled kernel cannot be run here: says what is missing and what to do."""
