"""Kernel templates, one folder a backend; each runs by itself and imports nothing of mctune."""
