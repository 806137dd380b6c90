"""FlashInfer-Trace: packages as a dataset of flashinfer-bench, and back.

The layout is the one that its ``TraceSet`` reads, the objects those of flashinfer-bench 0.1.2
(``flashinfer_bench.data``): what is computed is a Definition with a plain reference, a shape of it a Workload, a tuned
kernel a Solution, and its measured time a Trace.
"""
