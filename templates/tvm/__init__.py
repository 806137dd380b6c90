"""TVM templates: ``build(problem, config, target)`` returns the PrimFuncs of one pass."""
