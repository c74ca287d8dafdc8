"""The kernels of the numba backend, and what they stand on: threads, machine primitives, compiled code on disk."""
