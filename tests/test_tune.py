"""`python -m rectilinear tune`: no choice that it measures decides a bit, and what it keeps is used where it is to be trusted."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rectilinear
from rectilinear import tuning
from rectilinear.__main__ import main
from rectilinear.kernels.loops import host, passes, tuned
from rectilinear.kernels.loops.host import Cache, Caches, Host, host_of
from rectilinear.kernels.loops.plan import Backward, Matmul, plan, plan_backward, plan_forward
from rectilinear.kernels.loops.tuned import Choices
from rectilinear.kernels.micro.simd import AVX2, AVX512, NEON, SSE2
from rectilinear.kernels.runtime import cache, linking
from rectilinear.kernels.runtime.operands import Stack
from rectilinear.tuning import Case

posix = pytest.mark.skipif(os.name != "posix", reason="owners and permissions of POSIX")

EXTREMES = (Choices(w_uses=1, x_uses=1, turns=1, w_share=1), Choices(w_uses=1 << 20, x_uses=1 << 20, turns=64, w_share=1 << 20))


# No bit depends on a choice.

hosts = st.builds(
    lambda unit, size, l1, l2, l3: host_of(unit, size, Caches(Cache(l1 << 10, 8), Cache(l2 << 10, 8), Cache(l3 << 20, 16)), 2),
    st.sampled_from([AVX512, AVX2, SSE2, NEON]),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 48]),
    st.sampled_from([256, 1024]),
    st.sampled_from([1, 32]),
)
choices = st.builds(Choices, *[st.sampled_from([1, 2, 4, 8, 30, 100, 1 << 20])] * 4)
extents = st.one_of(st.integers(0, 40), st.integers(0, 3000), st.sampled_from([64, 512, 1024, 1040, 4096]))


@st.composite
def stacks(draw: st.DrawFn, rows: int, columns: int, size: int) -> Stack:
    """A matrix in rows or in columns, part of a wider one or not."""
    row = (columns + draw(st.sampled_from([0, 0, 0, 5]))) * size
    far = draw(st.sampled_from([row, row, 4096, 8192]))
    return Stack(1, 0, *draw(st.sampled_from([(max(row, far), size), (size, rows * size)])))


@settings(max_examples=600, deadline=None)
@given(st.data(), hosts, choices, extents, extents, extents)
def test_what_is_measured_decides_no_sum(data: st.DataObject, seen: Host, chosen: Choices, n: int, d: int, m: int) -> None:
    """Copies have the bits of what they copy. Reading w in place has those of packing it unless vectors reach past the last column."""
    x, w, dw = (data.draw(stacks(rows, columns, seen.itemsize)) for rows, columns in ((n, d), (d, m), (d, m)))
    forwards, backwards = [], []
    for described in (seen, replace(seen, choices=chosen)):
        forward = Matmul(a=x, b=w, n=n, k=d, m=m, groups=1)
        plan_forward(forward, described)
        backward = Backward(dout=Stack(1, 0, m * seen.itemsize, seen.itemsize), x=x, w=w, dx=x, dw=dw, n=n, d=d, m=m, groups=1)
        plan_backward(backward, described)
        forwards.append(forward.plan)
        backwards.append((backward.plan, backward.to_dx.plan, replace(backward.to_dw.plan, a=0)))
    one, other = forwards
    assert one.b == other.b or m % (one.width * seen.lanes) == 0
    assert replace(one, a=0, b=0, low_tiles=0) == replace(other, a=0, b=0, low_tiles=0)  # nor does the height of tiles change bits
    assert backwards[0] == backwards[1]


@pytest.fixture
def published() -> Iterator[None]:
    """For tests that publish a host: puts the right one back."""
    publish = passes.publish_host
    yield
    for itemsize in tuned.ITEMSIZES:
        publish(itemsize)


SHAPES = [
    (700, 1100, 1040, 0, 0),  # w packed or in place, K in more than one block, a last panel that is not a whole one in float32
    (700, 1100, 1024, 0, 0),  # w packed or in place, whole panels
    (600, 1100, 1020, 0, 4),  # w part of a wider one
    (64, 1024, 256, 0, 0),  # x copied or not
    (64, 1000, 256, 24, 0),  # part of a wider x
]
"""n, d, m, and by how many columns x and w are parts of wider arrays."""


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_columns", [False, True], ids=["dw in rows", "dw in columns"])
def test_bits_are_those_of_the_model(shape: tuple[int, ...], dtype: str, by_columns: bool, rng: np.random.Generator) -> None:
    n, d, m, more_x, more_w = shape
    x, w, dout = (rng.standard_normal(extents).astype(dtype) for extents in ((n, d + more_x), (d, m + more_w), (n, m)))
    x, w, b = x[:, :d], w[:, :m], dout[0]
    itemsize, found = x.itemsize, []
    model = host.model_of_host(itemsize).choices
    for chosen in (model, *EXTREMES):
        host.publish_host(itemsize, choices=chosen)
        dw = np.empty((m, d), dtype).T if by_columns else np.empty((d, m), dtype)
        with rectilinear.use_backend("numba"), rectilinear.num_threads(3):
            out, made = rectilinear.affine_forward(x, w, b)
            dx, _, db = rectilinear.affine_backward(dout, made, out=(np.empty_like(dout, shape=(n, d)), dw, np.empty_like(b)))
        found.append([result.tobytes() for result in (out, dx, dw, db)])
    assert found[0] == found[1]
    assert found[0] == found[2]


MACHINES = [
    (AVX2, Caches(Cache(32 << 10, 8), Cache(512 << 10, 8), Cache(32 << 20, 16)), set()),
    (AVX512, Caches(Cache(32 << 10, 8), Cache(1 << 20, 8), Cache(32 << 20, 16)), set()),
    (NEON, Caches(Cache(64 << 10, 4), Cache(1 << 20, 8), Cache(32 << 20, 16)), set()),
    # Its last cache is that of a w too large to be measured within minutes.
    (AVX512, Caches(Cache(48 << 10, 12), Cache(2 << 20, 16), Cache(260 << 20, 20)), {("w_share", 1), ("w_share", 16)}),
]


@pytest.mark.parametrize("itemsize", tuned.ITEMSIZES)
@pytest.mark.parametrize(("unit", "caches", "left_out"), MACHINES, ids=["Zen 3", "Zen 4", "Neoverse", "Emerald Rapids"])
def test_every_value_makes_another_plan_somewhere(unit: Any, caches: Caches, left_out: set[tuple[str, int]], itemsize: int) -> None:
    """Else it would be measured against itself."""
    seen = host_of(unit, itemsize, caches, cores=2)
    never = set()
    for trial in tuning.trials(seen):
        for value in trial.values:
            other = replace(seen.choices, **{trial.choice: value})
            if all(tuning.plans_alike(case, seen, seen.choices, other, 2) for case in trial.cases):
                never.add((trial.choice, value))
    assert never <= left_out


# Measuring


@pytest.mark.usefixtures("published")
def test_measuring_publishes_each_value_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TURN_S", 0.0)
    published, publish = [], host.publish_host
    monkeypatch.setattr(host, "publish_host", lambda itemsize, choices: (published.append(choices), publish(itemsize, choices=choices)))
    for op in ("forward", "backward"):
        seconds = tuning.measure(Case(op, (8, 9, 10)), 4, EXTREMES, 4)
        assert seconds.shape == (2, 4)
        assert (seconds > 0).all()
    one, other = EXTREMES
    assert published[:10] == [one, other, *[one, other, other, one] * 2]


@pytest.mark.usefixtures("published")
def test_other_bits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TURN_S", 0.0)
    publish, depths = host.publish_host, iter((64, 8))
    monkeypatch.setattr(host, "publish_host", lambda itemsize, choices: publish(itemsize, choices=choices, kc=next(depths)))
    with pytest.raises(RuntimeError, match="forward 40x60x80 in float32 has other bits"):
        tuning.measure(Case("forward", (40, 60, 80)), 4, EXTREMES, 1)


def ratios(*by_case: Sequence[float]) -> dict[Case, np.ndarray]:
    return {Case("forward", (i, i, i)): np.array(values) for i, values in enumerate(by_case)}


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        (ratios([0.9, 0.9, 0.9, 0.9]), True),
        (ratios([0.9, 0.9, 1.0, 1.0]), False),  # in half of the rounds
        (ratios([0.99, 0.99, 0.99, 0.99]), False),  # too little
        (ratios([0.8] * 4, [0.8] * 4, [1.1] * 4), False),  # at the cost of others
        (ratios([0.8] * 4, [1.0] * 4), True),
        ({}, False),
    ],
    ids=["faster", "now and then", "hardly", "slower elsewhere", "as fast elsewhere", "never measured"],
)
def test_what_is_taken(times: dict[Case, np.ndarray], taken: bool) -> None:
    assert tuning.wins(times) is taken


def measuring(speed: Callable[[Choices, int], float]) -> tuning.Measure:
    """Stands for `tuning.measure`: a call takes as long as `speed` says of choices, and of how often they were asked for."""
    asked: dict[tuple[Any, ...], int] = {}

    def measure(case: Case, itemsize: int, choices: Sequence[Choices], rounds: int) -> np.ndarray:
        for chosen in choices:
            key = case, itemsize, *asdict(chosen).values()
            asked[key] = asked.get(key, 0) + 1
        return np.array([[speed(chosen, asked[case, itemsize, *asdict(chosen).values()])] * rounds for chosen in choices])

    return measure


def quiet(label: str, begun: int) -> None:
    """A watch that does not look."""


def test_the_best_value_is_taken() -> None:
    chosen, rows = tuning.tune(4, quiet, measuring(lambda choices, asked: 1 / choices.x_uses))
    model = host.model_of_host(4).choices
    assert chosen == replace(model, x_uses=16)
    assert [(row.model, row.tuned) for row in rows if row.model != row.tuned] == [(4, 16)]


def test_what_does_not_win_twice_is_not_taken() -> None:
    chosen, _ = tuning.tune(4, quiet, measuring(lambda choices, asked: 0.5 if choices.x_uses == 2 and asked == 1 else 1.0))
    assert chosen == host.model_of_host(4).choices


# What is kept


@pytest.fixture
def kept(published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a cache that is empty; nothing is compiled for it."""
    monkeypatch.setattr(rectilinear, "warmup", lambda: None)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "150")
    return tmp_path / "cache" / "kernels"


FOUND = {4: Choices(w_uses=7, x_uses=2, turns=16, w_share=4), 8: Choices(w_uses=3, x_uses=8, turns=4, w_share=1)}


def test_what_was_measured_is_used(kept: Path) -> None:
    tuned.store(host.host_key(), FOUND)
    for itemsize, chosen in FOUND.items():
        assert host.this_host(itemsize) == replace(host.model_of_host(itemsize), choices=chosen)
        host.publish_host(itemsize)
        words = linking._published[f"rectilinear_host_f{8 * itemsize}"]
        assert list(words[-4:]) == list(asdict(chosen).values())
    assert tuned.forget(host.host_key())
    assert not tuned.forget(host.host_key())
    assert host.this_host(4) == host.model_of_host(4)


@posix
def test_it_is_private(kept: Path) -> None:
    before = os.umask(0)
    try:
        place = tuned.store(host.host_key(), FOUND)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (place, kept)] == [0o600, 0o700]
    assert [path.name for path in kept.iterdir()] == [place.name]


def test_another_machine_or_version_does_not_find_it(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = host.host_key()
    tuned.store(key, FOUND)
    for change in (
        lambda: monkeypatch.setattr(rectilinear, "__version__", "0.0.0"),
        lambda: monkeypatch.setattr(host, "host_target", lambda: ("x86_64", "another", "")),
        lambda: monkeypatch.setattr(host, "host_caches", lambda: Caches(l2=Cache(256 << 10, 8))),
        lambda: monkeypatch.setattr(os, "cpu_count", lambda: 77),
    ):
        with monkeypatch.context():
            change()
            assert host.host_key() != key
            assert host.this_host(4).choices == host.model_of_host(4).choices
        monkeypatch.undo()
        monkeypatch.setenv(cache.VARIABLE, str(kept.parent))
    assert host.this_host(4).choices == FOUND[4]


def _other_content(key: str, content: Any) -> Callable[[Path], object]:
    return lambda place: cache.write(place, bytes.fromhex(key), json.dumps(content).encode())


FIELDS = asdict(FOUND[4])
DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda place: place.write_bytes(place.read_bytes()[:-3]),
    "empty": lambda place: place.write_bytes(b""),
    "a byte changed": lambda place: place.write_bytes(place.read_bytes()[:-9] + b"9" + place.read_bytes()[-8:]),
    "of another machine": lambda place: tuned.store("00" * 32, FOUND).rename(place),
    "a folder": lambda place: (place.unlink(), place.mkdir()),
    "no fields": lambda place: _other_content(host.host_key(), {"4": {}, "8": {}})(place),
    "fields of a later version": lambda place: _other_content(host.host_key(), {"4": FIELDS | {"kc": 8}, "8": FIELDS})(place),
    "one dtype": lambda place: _other_content(host.host_key(), {"4": FIELDS})(place),
    "a choice of 0": lambda place: _other_content(host.host_key(), {"4": FIELDS | {"turns": 0}, "8": FIELDS})(place),
    "a choice beyond words": lambda place: _other_content(host.host_key(), {"4": FIELDS | {"turns": 1 << 70}, "8": FIELDS})(place),
    "not a number": lambda place: _other_content(host.host_key(), {"4": FIELDS | {"turns": "8"}, "8": FIELDS})(place),
    "a list": lambda place: _other_content(host.host_key(), [1])(place),
}
if os.name == "posix":
    DAMAGE["others can write"] = lambda place: place.chmod(0o666)
    DAMAGE["others can write to its folder"] = lambda place: place.parent.chmod(0o777)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_in_order_is_not_used(kept: Path, damage: str, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    DAMAGE[damage](tuned.store(host.host_key(), FOUND))
    with caplog.at_level(logging.DEBUG, "rectilinear"):
        assert host.this_host(4) == host.model_of_host(4)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "is not used" in record.getMessage()
    assert capfd.readouterr() == ("", "")


@posix
def test_of_another_user_it_is_not_used(kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tuned.store(host.host_key(), FOUND)
    monkeypatch.setattr(os, "geteuid", lambda: kept.stat().st_uid + 1)
    with caplog.at_level(logging.DEBUG, "rectilinear"):
        assert host.this_host(4) == host.model_of_host(4)
    assert "belongs to another user" in caplog.text


# The command


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen tasks a thread take half of the time."""
    monkeypatch.setattr(tuning, "measure", measuring(lambda choices, asked: 8 / choices.turns))


def test_tune_then_info_then_reset(kept: Path, fast: None, capsys: pytest.CaptureFixture[str]) -> None:
    def info() -> tuple[str, Any]:
        assert main(["info"]) == main(["info", "--json"]) == 0
        text = capsys.readouterr().out
        start = text.index("{\n")
        return text[:start], json.loads(text[start:])["tuned"]

    text, as_json = info()
    assert "host not tuned" in text
    assert as_json is None
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    assert "tasks per thread" in out
    assert "forward 512x512x512  0.50 0.50 0.50" in out
    assert str(kept) in out
    assert host.this_host(4).choices == replace(host.model_of_host(4).choices, turns=16)
    text, as_json = info()
    assert "host tuned: turns 16 (float32), turns 16 (float64)" in text
    assert as_json == {"float32": {"turns": 16}, "float64": {"turns": 16}}
    assert main(["tune", "--reset"]) == 0
    assert "host not tuned" in info()[0]
    assert main(["tune", "--reset"]) == 0
    assert "nothing to forget" in capsys.readouterr().out


def test_the_model_may_stand(kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tuning, "measure", measuring(lambda choices, asked: 1.0))
    assert main(["tune"]) == 0
    assert tuned.load(host.host_key()) == {itemsize: host.model_of_host(itemsize).choices for itemsize in tuned.ITEMSIZES}
    assert main(["info"]) == 0
    assert "host tuned: the model stands" in capsys.readouterr().out


def test_a_dry_run_keeps_nothing(kept: Path, fast: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--dry-run"]) == 0
    assert "nothing was kept" in capsys.readouterr().out
    assert not kept.exists()


def test_ctrl_c_keeps_what_was_there(kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tuned.store(host.host_key(), FOUND)

    def interrupted(case: Case, itemsize: int, choices: Sequence[Choices], rounds: int) -> np.ndarray:
        host.publish_host(itemsize, choices=choices[-1])
        if itemsize == 8:
            raise KeyboardInterrupt
        return np.ones((len(choices), rounds))

    monkeypatch.setattr(tuning, "measure", interrupted)
    assert main(["tune"]) == 130
    assert "interrupted: nothing was changed" in capsys.readouterr().err
    assert tuned.load(host.host_key()) == FOUND
    assert list(linking._published["rectilinear_host_f64"][-4:]) == list(asdict(FOUND[8]).values())


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/none"])
def test_where_nothing_can_be_kept(place: str, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(cache.VARIABLE, place)
    monkeypatch.setattr(tuning, "measure", None)  # it is said before anything is measured
    assert main(["tune"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tune: nothing can be kept (")
    assert "set RECTILINEAR_CACHE_DIR to a directory of your own" in err
    assert err.count("\n") == 1
    assert main(["tune", "--reset"]) == 0
    assert host.this_host(4) == host.model_of_host(4)


def test_a_user_without_home(kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nowhere() -> Path:
        raise FileNotFoundError("this user has no home directory")

    monkeypatch.setattr(cache, "directory", nowhere)
    assert main(["tune"]) == 1
    assert "no home directory" in capsys.readouterr().err
    assert host.this_host(4) == host.model_of_host(4)


def test_without_numba_there_is_nothing_to_tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rectilinear.backends.contract import Probe

    monkeypatch.setattr(tuning.NumbaBackend, "probe", lambda self: Probe(False, "numba cannot be imported"))
    assert main(["tune"]) == 1
    assert "tune: it is the numba backend that is tuned, and numba cannot be imported\n" == capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--dry-run", "--reset"], ["--fast"], ["more"]], ids=" ".join)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments])
    assert ended.value.code == 2


def test_a_plan_shows_what_a_choice_changes() -> None:
    seen = host.model_of_host(4)
    many = plan("forward", (512, 512, 512), replace(seen, choices=replace(seen.choices, turns=16)), threads=2)
    assert many.tasks.count > plan("forward", (512, 512, 512), seen, threads=2).tasks.count
