"""Backends: render a template with a configuration, build it for a target, load it."""

from __future__ import annotations

from mctune.backends.registry import backend_for as backend_for
from mctune.backends.registry import get_backend as get_backend
from mctune.backends.registry import makers as makers
