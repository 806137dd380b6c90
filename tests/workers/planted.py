"""Worker entries that do on purpose what a candidate kernel may do by accident."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

Stage = Callable[[str], None]


def entry(setup: dict[str, Any]) -> Callable[[dict[str, Any], Stage], dict[str, Any]]:
    """A handler that misbehaves as ``payload["do"]`` says and else answers what it was given."""
    if setup.get("fail"):
        raise RuntimeError("cannot set up: " + setup["fail"])

    def handle(payload: dict[str, Any], stage: Stage) -> dict[str, Any]:
        stage("build")
        match payload.get("do"):
            case "abort":
                os.abort()
            case "segfault":
                stage("verify")
                ctypes.string_at(0)
            case "hang":
                stage("time")
                time.sleep(600)
            case "hang_with_child":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=sys.stdout)
                with open(payload["pid_file"], "w") as file:
                    file.write(str(child.pid))
                time.sleep(600)
            case "raise":
                raise ValueError("a\nkernel refused")
            case "exit":
                sys.exit(3)
            case "exit_now":
                os._exit(7)
            case "not_json":
                return {"x": object()}
            case "garbage":
                for stream in (sys.stdout, sys.stderr):
                    stream.write('{"kind": "reply", "content": 1}\n\0garbage')
                    stream.flush()
                os.write(1, b"\xff\xfe" * 100_000)
                sys.stdin.read()
            case "environment":
                return {"value": os.environ.get(payload["name"])}
        return {"echo": payload, "setup": setup, "pid": os.getpid()}

    return handle
