"""TVM templates for NVIDIA GPUs: ``build(problem, config, target)`` returns the PrimFuncs of one operation."""
