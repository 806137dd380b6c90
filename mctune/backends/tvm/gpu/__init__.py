"""TVM's templates for NVIDIA GPUs: CUDA C from TVM, machine code from NVRTC, no toolkit and no GPU needed."""
