"""Memory Caching on a GPU beside what people use today: `mctune bench --gpu`, for a checkout that is not installed."""

from __future__ import annotations

from mctune.measure.gpu.run import main

if __name__ == "__main__":
    main()
