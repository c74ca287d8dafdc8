"""The loops around the micro-kernels, jitted: the plan of a pass, packing, products, and the passes that backends call."""
