"""Memory Caching on a GPU beside what people use today: what `mctune bench` runs for a package of GPU kernels."""
