"""What kernels stand on: records, memory, threads, linking by name, compiled code on disk."""
