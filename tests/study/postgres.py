"""A PostgreSQL server of a test's own: on 127.0.0.1, on a free port, in a temporary directory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_INSTALL = (
    "the tests of many workers need a PostgreSQL server and its driver: apt-get install postgresql (or your system's "
    "package that has initdb), and pip install 'psycopg[binary]'"
)


class Postgres:
    """The server; ``url`` is an Optuna storage."""

    def __init__(self, tools: Path, folder: Path) -> None:
        self._tools, self._folder = tools, folder
        # The server refuses to be root.
        self._as = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        if self._as:
            os.chown(folder, 65534, 65534)
        self._run("initdb", "-D", str(folder / "data"), "-U", "mctune", "-A", "trust", "-E", "UTF8", "--no-sync")

    @property
    def url(self) -> str:
        """Without a driver, as a person would write it."""
        return f"postgresql://mctune@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-h 127.0.0.1 -p {self.port} -k {self._folder} -F"
        self._run(
            "pg_ctl", "-D", str(self._folder / "data"), "-l", str(self._folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self, mode: str = "fast") -> None:
        """Stop it; connections are cut."""
        self._run("pg_ctl", "-D", str(self._folder / "data"), "-w", "-m", mode, "stop")

    def _run(self, tool: str, *arguments: str) -> None:
        command = [*self._as, str(self._tools / tool), *arguments]
        # The server outlives pg_ctl, and would keep a pipe open.
        with (self._folder.parent / f"{self._folder.name}.{tool}").open("w+") as said:
            done = subprocess.run(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, cwd="/", timeout=120)
            said.seek(0)
            assert done.returncode == 0, f"{tool}: {said.read()}"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server that has started, until the end of the block."""
    initdb = shutil.which("initdb") or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)), None
    )
    assert initdb is not None and importlib.util.find_spec("psycopg") is not None, _INSTALL
    with tempfile.TemporaryDirectory(prefix="mctune-pg-") as top:
        os.chmod(top, 0o755)
        folder = Path(top) / "server"
        folder.mkdir(mode=0o700)
        server = Postgres(Path(initdb).parent, folder)
        server.start()
        try:
            yield server
        finally:
            with suppress(AssertionError):
                server.stop("immediate")
