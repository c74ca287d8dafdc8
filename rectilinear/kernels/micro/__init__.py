"""What emits vector code: one micro-kernel a file, each with the loop it stands for in its docstring."""
