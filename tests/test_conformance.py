"""The conformance kit, on our own backends: every test of `rectilinear.testing`, on every variant of conftest.py.

What is tested of the kit itself is in test_conform.py.
"""

from __future__ import annotations

import rectilinear.testing

globals().update(rectilinear.testing.collect())
