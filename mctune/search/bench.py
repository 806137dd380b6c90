"""Time whatever computes the same problems side by side: kernels, the eager path, torch.compile of it, the machine.

Everything is held to the oracle on the very inputs that it is timed on; a wrong result has no time.
"""

from __future__ import annotations

