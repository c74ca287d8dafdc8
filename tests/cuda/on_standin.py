"""A pytest plugin, ``-p on_standin``: the stand-in in CuPy's place, so that TESTS_ON_CUPY=1 can be tried without a GPU.

Not for what needs CuPy beyond the layers: the stand-in has no arithmetic, and its arrays are not `cupy.asarray`'s.
"""

import os

import bench_standin

from rectilinear.backends import cupy_loader
from rectilinear.backends.contract import Probe

assert os.environ["KERNELS"], "the folder of the kernels built for the CPU"
assert bench_standin.build  # importing it has put the stand-in there
cupy_loader.examine = lambda backend: Probe(True, version="stand-in")
