"""The operations on a CUDA device: CuPy RawKernels on raw pointers, on the caller's device and stream."""
