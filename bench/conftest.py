"""Which cases the suites run: all of them when timing is on, the small ones otherwise, once each, as tests."""

from rectilinear.measure.cases import full_grid, small


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        timed = metafunc.config.getoption("benchmark_enable") or metafunc.config.getoption("benchmark_only")
        cases = [case for case in full_grid() if case.kind in metafunc.module.PASSES and (timed or small(case))]
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])
