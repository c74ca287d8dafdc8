"""From figures to words: ratios, rooflines, comparison of runs, the report, the command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from rectilinear.measure import charts, compare, report
from rectilinear.measure.cases import Case, full_grid, named
from rectilinear.measure.cli import main
from rectilinear.measure.figures import advice, bandwidth, best_peer, broken_ceilings, geometric_mean, headline, ratio, roof
from rectilinear.measure.record import Figure, Record, load
from rectilinear.measure.run import Plan, _probe

CEILINGS = {
    "probe": "made up",
    "threads": 1,
    "assumed": [],
    "flops": {"float32": 100e9, "float64": 50e9},
    "levels": [
        {"level": "L1", "capacity": 10**4, "footprint": 5000, "read": 100e9, "copy": 80e9, "copy_by": "copy"},
        {"level": "L2", "capacity": 10**6, "footprint": 5 * 10**5, "read": 50e9, "copy": 40e9, "copy_by": "copy"},
        {"level": "memory", "capacity": None, "footprint": 10**8, "read": 10e9, "copy": 8e9, "copy_by": "non-temporal copy"},
    ],
}
NAMES = {
    "numpy": "numpy",
    "numpy-out": "numpy",
    "other": "other",
    "cs231n": None,
    "torch": None,
    "torch-lean": None,
    "torch-compile": None,
    "jax": None,
    "sklearn": None,
}
FACTORS = {
    "numpy": 1.0,
    "numpy-out": 0.9,
    "other": 0.7,
    "cs231n": 1.1,
    "torch": 1.3,
    "torch-lean": 1.05,
    "torch-compile": 1.2,
    "jax": 1.0,
    "sklearn": 1.4,
}


def made_up(noise=0.01, seed=0, slow=(), drift=1.0, patterns=("step-*", "db-*", "relu_*", "train-*", "forward-1x*")):
    """A record whose subjects take known multiples of a time well above the roof, with noise per round."""
    rng = np.random.default_rng(seed)
    figures = []
    for case in named(full_grid(), patterns):
        base = drift * (2 * roof(case, CEILINGS).seconds + 1e-5)
        planted = {(case.name, name): factor for fits, name, factor in slow if case.name == fits}
        seconds = {
            name: [base * FACTORS[name] * planted.get((case.name, name), 1.0) * float(f) for f in 1 + noise * rng.uniform(-1, 1, 5)]
            for name in NAMES
        }
        figures.append(Figure(case.kind, case.shape, case.dtype, seconds))
    subjects = {
        name: {"backend": backend, "about": name, "note": "", "versions": {"numpy": "2"}, "threads": [], "idle_cpu": 0.0}
        for name, backend in NAMES.items()
    }
    record = Record("2024-01-01T00:00:00+00:00", {"grid": "made up", "rounds": 5, "threads": 1}, {"cpu": "A <fast> & rare CPU"}, subjects)
    return replace(record, ceilings=CEILINGS, figures=figures, complete=True, missing={"thinc": "No module named 'thinc'"})


GPU = {
    "device": "A <fast> GPU",
    "launch": [8e-6] * 5,
    "to_device": {"bytes": 2 * 10**6, "seconds": [1e-3, 9e-3, 1e-3]},
    "to_host": {"bytes": 10**6, "seconds": [2e-3] * 3},
}


def with_gpu(noise=0.01, seed=0, factor=1e-3):
    """Such a record with a backend and a peer on a GPU, a thousand times as fast, far beyond the processor's ceilings."""
    record = made_up(noise, seed)
    for name, backend in (("cupy", "cupy"), ("cs231n-cupy", None)):
        record.subjects[name] = record.subjects["numpy"] | {"backend": backend, "about": name}
        for f in record.figures:
            f.seconds[name] = [factor * s for s in f.seconds["numpy"]]
            f.gpu[name] = dict(GPU)
    return record


def figure(**seconds):
    return Figure("step", (1, 64, 64), "float32", seconds)


# ---------------------------------------------------------------- figures


def test_ratios_are_taken_round_by_round():
    # Both slow down threefold in the second round: the ratio is 2 in both, while that of the medians would say 4/2 as well
    # but that of a mixed pair, 6/1 or 2/3, would not.
    found = ratio(figure(a=[1.0, 3.0, 1.0], b=[2.0, 6.0, 3.0]), "a", "b")
    assert found == (2.0, 2.0, 3.0)


def test_geometric_mean():
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


@pytest.mark.smoke
def test_headline_knows_the_mean_the_worst_case_and_the_best_peer():
    fast = Figure("step", (2, 2, 2), "float32", {"a": [1.0] * 3, "b": [4.0] * 3, "c": [2.0] * 3})
    slow = Figure("step", (3, 3, 3), "float32", {"a": [2.0] * 3, "b": [1.0] * 3, "c": [3.0] * 3})
    against_b = headline([fast, slow], "a", "b", ["b", "c"])
    assert against_b.mean.mid == pytest.approx(2**0.5)  # sqrt(4 * 1/2)
    assert (against_b.worst.mid, against_b.worst_case.shape, against_b.cases) == (0.5, (3, 3, 3), 2)
    best = headline([fast, slow], "a", "best", ["b", "c"])
    assert best.mean.mid == pytest.approx(1.0)  # c at 2, b at 1/2
    assert best_peer(fast, ["b", "c"]) == "c"
    assert headline([fast], "a", "absent", ["b"]) is None


def test_roofline_by_hand():
    # 100 x 100 float32, db: 10**4 FLOP, 40000 bytes read, 400 written; more than twice L1's 10**4, so L2.
    # Bandwidth: 2 * 400 / 40400 of the bytes at 40 GB/s, the rest at 50; 40400 / 49.75 GB/s = 812 ns. FMA: 100 ns.
    found = roof(Case("db", (100, 100), "float32"), CEILINGS)
    assert found.bound == "L2"
    assert found.seconds == pytest.approx(812e-9, rel=1e-3)
    # 512**3 step: 6 * 512**3 + 512**2 FLOP at 100 GFLOP/s: 8.056 ms; 8 MiB at 8 GB/s: 1 ms.
    found = roof(Case("step", (512, 512, 512), "float32"), CEILINGS)
    assert found.bound == "FMA"
    assert found.seconds == pytest.approx(8.056e-3, rel=1e-3)
    assert roof(Case("step", (512, 512, 512), "float64"), CEILINGS).seconds == pytest.approx(2 * 8.056e-3, rel=1e-3)


def test_bandwidth_lies_between_reading_and_copying():
    level = CEILINGS["levels"][2]
    assert bandwidth(Case("relu_forward", (100, 100), "float32"), level) == pytest.approx(8e9)
    assert 9.9e9 < bandwidth(Case("db", (10**4, 100), "float32"), level) < 10e9


def test_a_subject_beyond_a_ceiling_is_an_error_of_the_probe():
    record = made_up()
    assert broken_ceilings(record) == []
    assert "the probe is wrong" not in report.html(record)
    case = record.figures[0].case
    record.figures[0].seconds["torch"] = [0.8 * roof(case, CEILINGS).seconds] * 5
    (line,) = broken_ceilings(record)
    assert line.startswith("torch reaches 125% of the measured ceiling")
    assert "the probe is wrong" in report.html(record)
    assert "the probe is wrong" in report.markdown(record)


def test_advice_names_the_fastest_backend_and_owns_up_to_ties():
    record = made_up()
    assert {row.best for row in advice(record)} == {"other"}  # numpy-out is numpy called otherwise, not a backend
    assert all(row.clear for row in advice(record))
    record.figures[0].seconds["numpy"] = list(record.figures[0].seconds["other"])
    tied = [row for row in advice(record) if not row.clear]
    assert [row.case for row in tied] == [record.figures[0].case]
    assert "either (" in report.markdown(record)


# ---------------------------------------------------------------- on a GPU


def test_a_gpu_is_not_held_against_the_processors_ceilings():
    record = with_gpu()
    assert broken_ceilings(record) == []
    (row, *_) = [line for line in report.markdown(record).splitlines() if line.startswith("| step-1x64x64-float32 |") and "%" in line]
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    for name, cell in zip([name for name in record.subjects if name != "numpy-out"], cells, strict=True):
        assert ("%" in cell) == ("cupy" not in name), name
    assert "The roofline is the processor's: a subject on a GPU has no share of it." in report.markdown(record)


def test_copies_and_launches_are_a_table_of_their_own_where_a_gpu_took_part():
    record = with_gpu()
    record.figures = [f for f in record.figures if f.case.name in ("step-1x64x64-float32", "db-10x100-float32")]
    record.figures[0].seconds["cupy"] = [9e-6] * 5
    record.figures[0].seconds["cs231n-cupy"] = [90e-6] * 5
    text = report.markdown(record)
    section = text.partition("## On the GPU: launches and copies")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| step-1x64x64-float32")]
    copies = ["1 ms", "2", "2 ms", "0.5"]  # 2 MB in the median of 1, 9 and 1 ms, and 1 MB
    assert rows == [
        ["step-1x64x64-float32", "cupy", "9 µs", "8 µs", "launches", *copies],
        ["step-1x64x64-float32", "cs231n-cupy", "90 µs", "8 µs", "the GPU", *copies],
    ]
    assert "| GPU | A <fast> GPU |" in text
    assert "A &lt;fast&gt; GPU" in report.html(record)
    assert "arrays are there already" in text


def test_without_a_gpu_the_report_says_nothing_of_one():
    for text in (report.markdown(made_up()), report.html(made_up())):
        assert "GPU" not in text


def test_the_best_peer_is_sought_where_the_subject_ran():
    f = Figure("step", (1, 64, 64), "float32", {"a": [4.0], "g": [0.5], "p": [2.0], "q": [0.25]}, {"g": GPU, "q": GPU})
    assert headline([f], "a", "best", ["p", "q"]).mean.mid == pytest.approx(0.5)
    assert headline([f], "g", "best", ["p", "q"]).mean.mid == pytest.approx(0.5)
    assert headline([f], "g", "best", ["p"]) is None
    assert headline([f], "g", "p", ["p"]).mean.mid == pytest.approx(4.0)


def test_a_gpu_is_compared_with_itself_and_not_by_the_processors_drift():
    old, new = with_gpu(0.01, 1), with_gpu(0.01, 2)
    for f in new.figures:  # the processor is slower now, the GPU is not
        f.seconds = {name: [s * (1 if name in f.gpu else 1.5) for s in seconds] for name, seconds in f.seconds.items()}
    assert {c.subject for c in compare.changes(old, new, 10.0)} == {"cs231n"}


def test_a_record_from_before_there_were_gpus_is_read(tmp_path):
    record = made_up()
    record.save(tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    data = json.loads(text)
    for f in data["figures"]:
        assert f.pop("gpu") == {}
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert load(tmp_path / "run.json") == record


# ---------------------------------------------------------------- comparison


@pytest.mark.parametrize("seed", range(5))
def test_comparison_stays_quiet_on_noise(seed):
    assert compare.changes(made_up(0.02, 1), made_up(0.02, 10 + seed), 10.0) == []
    noisy = made_up(0.02, 20 + seed)
    for f in noisy.figures:  # one interrupted round is not a change
        f.seconds["numpy"][2] *= 3
    assert compare.changes(made_up(0.02, 1), noisy, 10.0) == []


def test_comparison_stays_quiet_when_the_whole_machine_is_slower():
    old, new = made_up(0.02, 1), made_up(0.02, 2, drift=1.3)
    assert [c for c in compare.changes(old, new, 10.0) if c.subject != "cs231n"] == []
    assert compare.baseline_drift(old, new) == pytest.approx(1.3, rel=0.03)


@pytest.mark.parametrize("drift", [1.0, 0.7])
def test_comparison_catches_a_planted_slowdown_and_only_it(drift):
    name = "step-256x784x512-float32"
    found = compare.changes(made_up(0.02, 1), made_up(0.02, 2, slow=[(name, "numpy", 1.2)], drift=drift), 10.0)
    found = [change for change in found if change.subject != "cs231n"]
    assert [(c.case, c.subject, c.regression) for c in found] == [(name, "numpy", True)]
    assert found[0].factor == pytest.approx(1.2, rel=0.05)


def test_a_slower_peer_and_a_tolerated_slowdown_are_no_regression():
    name = "step-256x784x512-float32"
    new = made_up(0.01, 2, slow=[(name, "numpy", 1.2), (name, "torch", 1.5)])
    assert {(c.subject, c.regression) for c in compare.changes(made_up(0.01, 1), new, 30.0)} == {("numpy", False), ("torch", False)}


def test_a_backend_that_no_longer_runs_a_case_is_a_regression(tmp_path, capsys):
    old, new = made_up(), made_up()
    del new.figures[3].seconds["numpy"]
    assert compare.gone(old, new) == [f"{new.figures[3].case.name}: numpy"]
    assert _compare(tmp_path, old, new) == 1
    assert "no longer measured" in capsys.readouterr().out


def _compare(tmp_path, old, new, *more):
    old.save(tmp_path / "old.json")
    new.save(tmp_path / "new.json")
    return main(["--from", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json"), "--out", str(tmp_path), *more])


def test_the_command_exits_non_zero_on_a_regression(tmp_path, capsys):
    new = made_up(0.01, 2, slow=[("db-100x100-float32", "numpy", 1.25)])
    assert _compare(tmp_path, made_up(0.01, 1), new) == 1
    assert "REGRESSION: numpy in db-100x100-float32 takes 1.2" in capsys.readouterr().out
    assert _compare(tmp_path, made_up(0.01, 1), new, "--tolerance", "30") == 0
    assert _compare(tmp_path, made_up(0.01, 1), made_up(0.01, 2)) == 0
    assert "nothing changed beyond noise" in capsys.readouterr().out


# ---------------------------------------------------------------- record


@pytest.mark.smoke
def test_a_record_survives_saving(tmp_path):
    record = with_gpu()
    record.save(tmp_path / "deep" / "run.json")
    assert load(tmp_path / "deep" / "run.json") == record


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "format None"), ('{"format": 99}', "format 99")])
def test_a_foreign_file_is_refused(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.json")


# ---------------------------------------------------------------- report


class Page(HTMLParser):
    """Checks nesting and collects what could fetch something."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.headings = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        assert tag not in ("script", "img", "iframe", "object", "form")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.mark.smoke
def test_the_page_is_whole_and_fetches_nothing():
    text = report.html(made_up())
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.references == ["data:,"]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "A &lt;fast&gt; &amp; rare CPU" in text
    assert page.headings == [
        "Which backend to choose here, by size",
        "Headline",
        "Ratios by shape",
        "Throughput of the whole step against its size",
        "Latency at small sizes",
        "Bandwidth of the memory-bound passes",
        "All figures",
        "FLOPs and least bytes of each pass",
        "Machine and method",
        "Left out",
    ]
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def opening(record):
    """The opening section of the page: its text, and its charts as elements."""
    section = re.search(r"<section><h2>Which backend.*?</section>", report.html(record), re.DOTALL)[0]
    return re.search(r"<p>(.*?)</p>", section)[1], [ElementTree.fromstring(f) for f in re.findall(r"<figure>.*?</figure>", section)]


def test_the_report_opens_with_whom_to_choose_and_a_picture_of_it():
    record = made_up(noise=0, patterns=("step-*x64x64-*", "step-512x512x512-*", "db-*"))
    text, (single, double) = opening(record)
    assert "In float32 choose other at every size: it is 1.57 times as fast as plain NumPy (geometric mean of 3 shapes)" in text
    assert "peer" not in text
    for chart in (single, double):
        labels = [t.text for t in chart.iter("text")]
        assert [label for label in labels if label.count("x") == 2] == ["1x64x64", "512x512x512", "65536x64x64"]  # by their FLOPs
        marks = [t.text for t in chart.iter("title")]
        assert marks[:3] == ["1x64x64: fastest peer 1.10", "1x64x64: numpy 1.10", "1x64x64: other 1.57"]
        assert len(marks) == 9
        assert not any("-out" in mark for mark in marks)


def test_the_opening_owns_up_to_exceptions():
    small, large = "step-1x64x64-float32", "step-512x512x512-float32"
    slow = [(small, "other", 2.0), (large, "jax", 0.5)]
    record = made_up(noise=0, patterns=("step-*-float32",), slow=slow)
    text, _ = opening(record)
    assert "choose other, but numpy at 1x64x64. other is " in text
    assert "0.79 times at worst, at 1x64x64. A peer is faster at 1x64x64 and 512x512x512. " in text
    slow = [(f.case.name, "other", 2.0) for f in record.figures[:7]]
    text, _ = opening(made_up(noise=0, patterns=("step-*-float32",), slow=slow))
    assert re.search(r"choose other, but numpy at \w+, \w+, \w+ and 4 more\. ", text)


def test_without_plain_numpy_there_is_a_table_and_no_picture():
    record = made_up()
    for f in record.figures:
        del f.seconds["cs231n"]
    del record.subjects["cs231n"]
    assert "<figure>" not in re.search(r"<section><h2>Which backend.*?</section>", report.html(record), re.DOTALL)[0]
    assert "| affine+ReLU forward and backward | 1x64x64 | float32 |" in report.markdown(record)


def test_nets_without_steps_are_pictured_by_pass_and_size():
    _, (single, _) = opening(made_up(patterns=("train-*",)))
    assert [t.text for t in single.iter("text") if t.text.startswith("train")] == []  # one pass alone needs no name
    _, (single, _) = opening(made_up(patterns=("train-32-*", "db-100x100-*")))
    assert [t.text for t in single.iter("text")][-3:-1] == ["db 100x100", "train 32"]


def test_calls_into_preallocated_arrays_are_folded_away():
    shown = re.sub(r"<details>.*?</details>", "", report.html(made_up()).partition("<h2>Machine and method")[0], flags=re.DOTALL)
    assert "numpy-out" not in shown
    assert "numpy-out" in report.html(made_up()).partition("<h2>Machine and method")[0]


def test_a_chart_of_dots_has_room_for_any_ratio_and_for_its_line():
    for values in ([1.0], [1e-4, 3.0], [7.0, 8.0]):
        drawing = charts.dots([("a <row>", [("b & c", value, 0) for value in values])], "x", "even", "t")
        numbers = [float(n) for n in re.findall(r'cx="([-\d.]+)"', drawing)]
        assert len(numbers) == len(values) + 1  # and the legend's
        assert all(56 <= n <= 470 for n in numbers[:-1])
        line = float(re.search(r'd="M([\d.]+) [\d.]+V[\d.]+" stroke="#333"', drawing)[1])
        assert all((value < 1) == (n < line) and (value > 1) == (n > line) for value, n in zip(values, numbers, strict=False))
        ElementTree.fromstring(drawing)


def test_the_report_compares_fortran_order_with_c_order():
    record = made_up(patterns=("step*-128x784x256-float32",))
    c_order, fortran = record.figures
    fortran.seconds["numpy"] = [2 * s for s in c_order.seconds["numpy"]]
    del fortran.seconds["torch"]
    section = report.markdown(record).partition("## w in Fortran order")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert rows[0][:2] == ["shape", "numpy"]
    assert rows[2][:2] == ["128x784x256", "0.50"]
    assert "torch" not in rows[0]


def test_what_went_wrong_comes_first():
    record = made_up()
    record.complete, record.others = False, 1.5
    record.refused = [{"case": "step-x", "subject": "<b>liar</b>", "reason": "off | by 3"}]
    text = report.html(record)
    assert text.index("Read this first") < text.index("Headline")
    assert "&lt;b&gt;liar&lt;/b&gt;" in text
    assert "interrupted" in text
    assert "1.5 processors busy" in text


def test_the_report_of_a_run_that_measured_nothing_can_be_written():
    record = Record("now", {}, {})
    assert "Read this first" in report.html(record)
    assert "Read this first" in report.markdown(record)


def test_markdown_tables_are_rectangular():
    record = made_up()
    record.refused = [{"case": "step-x", "subject": "liar", "reason": "off | by 3"}]
    width = None
    for line in report.markdown(record).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, cells)
        width = cells


def test_shades_are_symmetric_and_leave_text_readable():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert charts.shade(1.0) == "#ffffff"
    assert charts.shade(4.0) == charts.shade(100.0) != charts.shade(0.25) == charts.shade(0.01)
    for value in (0.1, 0.5, 0.9, 1.5, 4.0):  # WCAG AA, #111 on the shade
        assert (luminance(charts.shade(value)) + 0.05) / (luminance("#111111") + 0.05) > 4.5


def test_chart_axes_hold_any_positive_values():
    for points in ([(1.0, 1.0)], [(1e3, 1e-6), (1e12, 1e6)], [(5.0, 7.0), (5.0, 7.0)]):
        drawing = charts.lines([charts.Series("a & b", points, 0), charts.Series("roof", points, None)], "x", "y", "t < u")
        figure_element = ElementTree.fromstring(drawing)
        numbers = re.findall(r'c[xy]="([-\d.]+)"', drawing)
        assert numbers
        assert all(0 <= float(number) <= 470 for number in numbers)
        assert figure_element.find("svg") is not None


# ---------------------------------------------------------------- the command


def test_listing_names_the_chosen_cases(capsys):
    assert main(["--list", "--only", "db-*", "--subjects", "cs231n"]) == 0
    assert capsys.readouterr().out.split() == [case.name for case in full_grid() if case.kind == "db"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "nobody"], "no subject is named nobody; there are "),
        (["--only", "nothing"], "no case is named 'nothing'"),
        (["--rounds", "0"], "0 is not a positive number"),
        (["--compare", "absent.json"], "absent.json"),
    ],
)
def test_wrong_usage_says_what_there_is(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_from_start_to_end(tmp_path, capsys):
    arguments = ["--subjects", "numpy,cs231n", "--only", "step-1x64x64-*", "--rounds", "2", "--seconds", "0.002", "--no-ceilings"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    record = load(tmp_path / "run.json")
    assert record.complete
    assert [f.case.name for f in record.figures] == ["step-1x64x64-float32", "step-1x64x64-float64"]
    assert all(len(rounds) == 2 for f in record.figures for rounds in f.seconds.values())
    assert "Which backend to choose here" in capsys.readouterr().out
    assert "step-1x64x64-float32" in (tmp_path / "report.md").read_text()
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_a_refused_backend_makes_the_command_fail(tmp_path, capsys):
    record = made_up()
    record.refused = [{"case": "step-x", "subject": "numpy", "reason": "off"}]
    record.save(tmp_path / "run.json")
    assert main(["--from", str(tmp_path / "run.json"), "--out", str(tmp_path)]) == 1
    assert "REFUSED: numpy in step-x: off" in capsys.readouterr().out


def test_a_budget_that_is_over_leaves_cases_out_by_name(tmp_path):
    arguments = ["--subjects", "cs231n", "--only", "db-10x100-*", "--no-ceilings", "--budget", "1e-9", "--out", str(tmp_path)]
    assert main(arguments) == 0
    record = load(tmp_path / "run.json")
    assert record.figures == []
    assert [entry["case"] for entry in record.left_out] == ["db-10x100-float32", "db-10x100-float64"]


def test_ceilings_that_cannot_be_measured_are_missing_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("rectilinear.measure.run.sys.executable", "false")
    record = Record("now", {}, {})
    assert _probe(Plan([], [], {}, 1, 0.1), 1, record) == {}
    assert record.missing == {"ceilings": "the probe ended with status 1"}
    assert "ended with status 1" in report.html(record)


def test_an_interrupted_run_keeps_what_was_measured(tmp_path):
    # A background job of a shell ignores SIGINT, and its children with it.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from rectilinear.measure.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["full", "--subjects", "cs231n", "--rounds", "3", "--seconds", "0.1", "--no-ceilings", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stderr=subprocess.DEVNULL
    )
    saved = tmp_path / "run.json"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (saved.exists() and len(load(saved).figures) >= 2):
            time.sleep(0.02)
        assert len(load(saved).figures) >= 2  # on disk before the end
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.wait()
    record = load(saved)
    assert not record.complete
    assert len(record.figures) >= 2
    assert all(len(f.seconds["cs231n"]) == 3 for f in record.figures)
    assert "interrupted" in (tmp_path / "report.html").read_text()


def test_importing_rectilinear_loads_none_of_this():
    code = "import rectilinear, sys; sys.exit(any(m.startswith(('rectilinear.measure', 'rich', 'llvmlite', 'numba')) for m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False).returncode
        == 0
    )
