"""The Triton backend: templates rendered to modules whose kernels Triton compiles for a GPU."""
