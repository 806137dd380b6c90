"""Kernels that are recorded instead of launched: what a call would launch, with what the assembler says of it."""
