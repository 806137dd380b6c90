"""Launchers of kernels that TVM made for NVIDIA GPUs: machine code, and what it is called with."""
