"""Suite: `rectilinear.jax` around its break-even: eager calls on the kernels and in JAX's own operations, and a jitted step by either."""

import numpy as np
import pytest

pytestmark = pytest.mark.libraries

SHAPES = ((64, 256, 256), (32, 1024, 1024), (128, 512, 512), (256, 1024, 1024), (1024, 1024, 1024), (8192, 64, 64), (4096, 784, 10))
"""(n, d, m)."""


def arrays(shape):
    import jax

    n, d, m = shape
    rng = np.random.default_rng(0)
    return [jax.numpy.asarray(rng.standard_normal(size), "float32") for size in ((n, d), (d, m), (m,))]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("way", ["kernels", "jax"])
def test_eager(benchmark, way, shape):
    from rectilinear import jax as ours

    given = arrays(shape)
    call = ours._in_jax["affine_relu_forward"]
    benchmark.group = f"eager {shape}"
    if way == "kernels":
        benchmark(lambda: ours._on_kernels("affine_relu_forward", ours._views(given)))
    else:
        benchmark(lambda: call(*given).block_until_ready())


@pytest.mark.parametrize("shape", SHAPES[2:4], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("callback", [True, False], ids=["callback", "jax"])
def test_step(benchmark, callback, shape):
    """Forward and all gradients, compiled."""
    import jax

    from rectilinear import jax as ours

    given = arrays(shape)
    step = jax.jit(jax.value_and_grad(lambda *args: ours.affine_relu(*args, callback=callback).sum(), (0, 1, 2)))
    benchmark.group = f"jitted step {shape}"
    benchmark(lambda: jax.block_until_ready(step(*given)))
