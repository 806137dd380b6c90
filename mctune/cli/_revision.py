"""What a user names on the command line: a path, or a commit of the repository in the current directory."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mctune.core.errors import UsageError

_LIMIT_S = 60.0
_FOLDER = "results"
_ENVIRONMENT = {"LC_ALL": "C", "GIT_LITERAL_PATHSPECS": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0"}


@dataclass(frozen=True)
class Found:
    """Where something is, what its user calls it, and the commit that it is of and its date, if it is of one."""

    path: Path
    called: str
    commit: str = ""
    date: str = ""


@contextmanager
def found(text: str) -> Iterator[Found]:
    """A path that exists; else what ``REV`` or ``REV:PATH`` names, PATH being ``results`` and from the repository's
    root, in a temporary folder.

    Raises:
        UsageError: if it is neither.
    """
    try:
        exists = Path(text).exists()
    except OSError:  # too long for a name
        exists = False
    if exists:
        yield Found(Path(text), text)
        return
    revision, colon, inside = text.partition(":")
    inside = inside.strip("/") or _FOLDER
    commit, date = _commit(text, revision)
    with tempfile.TemporaryDirectory(prefix="mctune-") as folder:
        called = text if colon else f"{text}:{inside}"
        _extract(commit, inside, Path(folder), called)
        yield Found(Path(folder) / inside, called, commit, date)


def _commit(text: str, revision: str) -> tuple[str, str]:
    """The hash of a commit, and its date."""
    why = ""
    if revision and not revision.startswith("-") and ".." not in revision:  # an option, a range
        done = _git("log", "-1", "--no-show-signature", "--format=%H %cI", "--end-of-options", revision, "--")
        if done.returncode == 0 and len(told := done.stdout.decode("ascii", "replace").split()) == 2:
            return told[0], told[1]
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = f" (git: {said[0][:200]})" if said and "bad revision" not in said[0] else ""
    raise UsageError(
        f"{text:.200} is neither a path that exists nor a commit of the repository in this directory{why}; give a "
        "folder of results, a package, REV or REV:results/cpu"
    )


def _extract(commit: str, inside: str, folder: Path, called: str) -> None:
    """Write the regular files of a commit that are ``inside`` into ``folder``."""
    listed = _git("ls-tree", "-r", "-z", "--full-tree", commit, "--", inside).stdout
    blobs: list[tuple[str, str]] = []
    for entry in os.fsdecode(listed).split("\0"):
        about, _, name = entry.partition("\t")
        if about.startswith(("100644 ", "100755 ")):
            blobs.append((about.split()[2], name))
    if not blobs:
        raise UsageError(f"{called} does not exist: that commit has no files at {inside:.200}")
    data = _git("cat-file", "--batch", given="".join(f"{blob}\n" for blob, _ in blobs).encode()).stdout
    at = 0
    for blob, name in blobs:
        begins = data.index(b"\n", at) + 1
        size = data[at:begins].split()[-1]
        if not size.isdigit() or any(part in ("", ".", "..") for part in name.split("/")):
            raise UsageError(f"{called}: {blob} ({name:.200}) cannot be read from the repository")
        at = begins + int(size) + 1
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[begins : at - 1])


def _git(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["git", *arguments], input=given, capture_output=True, timeout=_LIMIT_S, env={**os.environ, **_ENVIRONMENT}
        )
    except (OSError, ValueError) as error:
        why = "git is not installed" if isinstance(error, FileNotFoundError) else str(error)
        raise UsageError(f"{why}: give paths that exist instead of commits") from error
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"git {arguments[0]} took longer than {_LIMIT_S:g} s; give a path instead") from error
