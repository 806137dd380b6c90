"""The errors that mctune raises on purpose; each carries the exit code that the command line returns for it."""

from __future__ import annotations


class MctuneError(Exception):
    """Base of every error raised on purpose: names the offender, the limit and the remedy."""

    exit_code = 1


class UsageError(MctuneError, ValueError):
    """The caller asked for something that cannot be: a bad combination, an unknown name, a value out of range."""

    exit_code = 2


class DeviceError(MctuneError, RuntimeError):
    """The device, or what is needed to reach it (a compiler, a library), is not on this machine."""

    exit_code = 3


class NoValidConfigError(MctuneError, RuntimeError):
    """A search ended without one configuration that is correct and fits the target."""

    exit_code = 4


class RegressionError(MctuneError):
    """A comparison found something slower than before, beyond noise."""

    exit_code = 5
