"""Where studies are stored: files as URLs, one search a file at a time, patience, and what is said when it fails."""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes, urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    InternalError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)

from mctune.core.errors import MctuneError, UsageError
from mctune.core.interrupt import Held
from mctune.core.remark import redacted, redacted_url

try:
    import grpc

    _Rpc: type[Exception] = grpc.RpcError
except ImportError:

    class _NoRpc(Exception):
        """What no storage raises where there is no gRPC."""

    _Rpc = _NoRpc

BROKEN = (StorageInternalError, SQLAlchemyError, _Rpc)
"""What Optuna raises when a storage can no longer be read or written."""
ILLEGIBLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What Optuna raises where single rows of a study are damaged."""
ABOUT = "mctune"
"""The attribute of a study that says what it is about."""
_FOR_GOOD = ("malformed", "not a database", "no such", "has no column", "is full", "readonly", "unable to open")
_RACED = ("already exists", "duplicate key", "Duplicate entry")
_RACES = 20
_GRPC, _GRPC_PORT = "grpc://", 13000
_Result = TypeVar("_Result")


def sqlite_url(path: Path) -> str:
    """The Optuna URL of a SQLite file, whatever characters its path has.

    Examples:
        >>> sqlite_url(Path("/tmp/search.db"))
        'sqlite:////tmp/search.db'
    """
    file = os.fsencode(path.absolute())
    plain, twice = f"sqlite:///{quote(file)}", f"sqlite:///file:{quote(quote(file))}?uri=true"
    if make_url(plain).database == os.fsdecode(file):
        return plain
    # SQLAlchemy 2.0 takes a path as it stands; 2.1 decodes it, and not what is no UTF-8. SQLite decodes one of file:.
    return twice if make_url(twice).database == f"file:{quote(file)}" else f"sqlite:///file:{quote(file)}?uri=true"


def sqlite_path(url: str | None) -> Path | None:
    """The file of a SQLite URL; ``None`` for every other storage, one in memory included."""
    try:
        parts = make_url(url or "")
    except (ArgumentError, ValueError):
        return None
    if parts.get_backend_name() != "sqlite" or not parts.database or parts.database == ":memory:":
        return None
    if parts.database.startswith("file:"):
        return Path(os.fsdecode(unquote_to_bytes(parts.database.removeprefix("file:"))))
    return Path(parts.database)


def url_of(storage: str) -> str:
    """An Optuna URL from what a user gives: one already, or the path of a SQLite file."""
    return storage if "://" in storage else sqlite_url(Path(storage))


def shared(url: str | None) -> bool:
    """Whether several processes may search the studies of a storage at the same time.

    Examples:
        >>> shared("postgresql://host/mctune"), shared("sqlite:////tmp/search.db"), shared(None)
        (True, False, False)
    """
    return url is not None and not url.startswith("sqlite")


@contextmanager
def alone(url: str | None) -> Iterator[None]:
    """Keep other processes from searching the studies of a SQLite file; another storage is not looked after.

    Raises:
        UsageError: if one does.
    """
    path = sqlite_path(url)
    try:
        lock = -1 if path is None else os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # opening the storage will say why
        lock = -1
    try:
        if lock >= 0:
            _take(lock, path)
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _take(lock: int, path: Path | None) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(lock, 32, 0).decode(errors="replace").strip() or "another"
        raise UsageError(
            f"the studies in {path} are being searched by process {who}; wait for it to end, give another --storage or "
            "--out, or share the study: --workers N, or the same command elsewhere, with --storage postgresql://..."
        ) from None
    except OSError:
        return  # a file system without locks
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def opened(url: str | None, patience_s: float) -> optuna.storages.BaseStorage:
    """The Optuna storage of a URL.

    Raises:
        UsageError: if it cannot be opened: no such driver or server, no SQLite file, tables of another version.
    """
    try:
        if url is not None and url.startswith(_GRPC):
            return _proxy(url, patience_s)
        if url is None or "://" not in url or url.startswith("redis"):
            return optuna.storages.get_storage(url)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.startswith("sqlite"):
            options = {"connect_args": {"timeout": patience_s / 4, "factory": _Connection}}
        return optuna.storages.get_storage(_created(url, options))
    except (*BROKEN, ImportError, OSError, ValueError, RuntimeError) as error:
        why = _without(url, reason(error))
        remedy = "give an Optuna URL such as sqlite:///search.db, and install the driver that it needs"
        if "locked" in why:
            remedy = "another process holds it: wait until that has ended, or give another --storage"
        raise UsageError(f"cannot open the storage {redacted_url(str(url))}: {why}; {remedy}") from error


class _Connection(sqlite3.Connection):
    """To a file whose journal is emptied when something was written, where SQLite would delete it.

    As safe, and ten times as fast where a file system takes long to delete. A file that keeps another journal, a
    write-ahead log say, goes on with it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.execute("pragma journal_mode").fetchone() == ("delete",):
            self.execute("pragma journal_mode = truncate")


def _proxy(url: str, patience_s: float) -> optuna.storages.GrpcStorageProxy:
    """Optuna's proxy at ``grpc://HOST:PORT``, which stands in front of a server that many workers share."""
    if find_spec("grpc") is None:
        raise ImportError("No module named 'grpc'")
    parts = urlsplit(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=parts.hostname or "localhost", port=parts.port or _GRPC_PORT)
    proxy.wait_server_ready(timeout=patience_s)
    return proxy


def studies_in(url: str, patience_s: float) -> dict[str, dict[str, Any]]:
    """What every study of mctune in a storage is about, by the studies' names; no trial is read.

    Raises:
        UsageError: if the storage cannot be opened or read.
    """
    try:
        with legible(url):
            found = {one.study_name: one.user_attrs.get(ABOUT) for one in opened(url, patience_s).get_all_studies()}
    except BROKEN as error:
        raise UsageError(f"the studies in {redacted_url(url)} cannot be read: {reason(error)}") from error
    return {name: dict(about["attrs"]) for name, about in found.items() if isinstance(about, dict) and "attrs" in about}


def _created(url: str, options: dict[str, Any]) -> optuna.storages.RDBStorage:
    """The storage with its tables; several workers may be about to create them."""
    if url.startswith("postgresql://") and find_spec("psycopg") is not None:
        url = url.replace("://", "+psycopg://", 1)  # SQLAlchemy 2.0 would take an older driver
    for _ in range(_RACES):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=options)
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if not any(words in str(error) for words in _RACED):
                raise
        time.sleep(random.uniform(0.05, 0.2))
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def patiently(do: Callable[[], _Result], ctrl_c: Held, patience_s: float) -> _Result:
    """The result of ``do``, which may be done twice; tried again, ever more rarely, while a storage may come back."""
    until, pause = time.monotonic() + patience_s, 0.25
    while True:
        try:
            return do()
        except BROKEN as error:
            if not _may_pass(error) or time.monotonic() + pause > until:
                raise
        with ctrl_c.let_in():
            time.sleep(pause)
        pause = min(2 * pause, 5.0)


@contextmanager
def legible(url: str | None) -> Iterator[None]:
    """Turn what Optuna stumbles over in a file of which single rows are damaged into an error of one line.

    Raises:
        UsageError: with what that was.
    """
    try:
        yield
    except MctuneError:
        raise
    except ILLEGIBLE as error:
        raise UsageError(
            f"the studies in {redacted_url(str(url))} cannot be read: {type(error).__name__} {reason(error)}; restore "
            "the file from a copy, or give another --storage or --out"
        ) from error


def reason(error: BaseException) -> str:
    """One line that says why a storage failed, without any password."""
    if isinstance(error, _Rpc):
        error = RuntimeError(_details(error))
    lines = str(error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error).splitlines()
    return redacted(lines[0]) if lines else type(error).__name__


def _details(error: BaseException) -> str:
    """What a proxy says of a call that failed."""
    details = getattr(error, "details", None)
    return str(details() if details is not None else error)


def _without(url: str | None, text: str) -> str:
    return text.replace(url, redacted_url(url)) if url else text


def _may_pass(error: BaseException) -> bool:
    """Whether an error is a server's restart or another program's lock, not a file that is damaged or a full disk."""
    if isinstance(error, _Rpc):  # the proxy is not there, or what it stands in front of
        code = getattr(error, "code", lambda: None)()
        return getattr(code, "name", "") in ("UNAVAILABLE", "DEADLINE_EXCEEDED") or "Operational" in _details(error)
    cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
    return isinstance(cause, OperationalError | InterfaceError | InternalError | PendingRollbackError) and not any(
        words in str(cause) for words in _FOR_GOOD
    )
