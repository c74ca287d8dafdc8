"""What the report of a run says: `sections`, once, for the HTML page and for Markdown; `page` writes them down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from rectilinear.measure import charts, isa, page
from rectilinear.measure.cases import ITEMSIZE, PASSES, Case
from rectilinear.measure.figures import (
    Headline,
    Spread,
    advice,
    best_peer,
    broken_ceilings,
    choices,
    headline,
    not_held,
    on_host,
    ratio,
    roof,
)
from rectilinear.measure.page import Cell, Section, Table
from rectilinear.measure.record import Figure, Record
from rectilinear.measure.subjects import BASELINE

MEMORY_BOUND = ("db", "relu_forward", "relu_backward")
BUSY = 0.1
"""Processors kept busy by others from which on a report warns: one thread that waits for a processor holds up a whole BLAS call."""
SMALL_FLOPS = 10**7
"""A step below this is over in microseconds: calling it costs more than computing it."""
HOST_BOUND = 0.8
"""The share of a call's time on a GPU from which on the host's launching is what it waits for; the two are measured one after the other."""


def sections(record: Record) -> list[Section]:
    """Everything the report says, in its order; what was not measured is not there."""
    made = [_alarms(record), _choice(record), _headlines(record), _heatmaps(record), _fortran(record), _throughput(record)]
    made += [
        _latency(record),
        _memory_bound(record),
        _gpu(record),
        _everything(record),
        _least_work(record),
        _held(record),
        _machine(record),
    ]
    made.append(_absent(record))
    return [section for section in made if section.tables or section.charts or section.folded or section.text]


# ---------------------------------------------------------------- what is said


def _alarms(record: Record) -> Section:
    section = Section("Read this first", alarm=True)
    broken = broken_ceilings(record)
    if broken:
        estimate = " The ceilings are an estimate here, so that can happen." if "estimate" in record.ceilings["probe"] else ""
        section.text = f"A measured ceiling was beaten: the probe is wrong, and so is every fraction of the roofline below.{estimate}"
        section.tables.append(Table(["what"], [[line] for line in broken]))
    if record.refused:
        rows = [[entry["subject"], entry["case"], entry["reason"]] for entry in record.refused]
        section.tables.append(Table(["subject", "case", "why"], rows, "Refused, since the results were wrong against float64"))
    astray = not_held(record)
    if astray:
        section.tables.append(Table(["what"], [[line] for line in astray], f"Not held to {record.isa.upper()}"))
    if (record.others or 0.0) > BUSY:
        section.text += f" Other programs kept {record.others:.1f} processors busy meanwhile: measure again on a quiet machine. "
    if not record.complete:
        section.text += " This run was interrupted; what follows is what had been measured by then."
    return section


def _held(record: Record) -> Section:
    """What held the subjects to an instruction set, what each library says of it, and what the system saw."""
    if record.isa == "host":
        return Section("")
    name, machine = record.isa.upper(), record.machine
    section = Section(f"Held to {name}", f"The process of every subject, and of the ceilings, was held to {name} by variables of its own. ")
    section.text += f"The host has {machine.get('simd')}, and the caches are the host's: {_fact(machine.get('caches', {}))}. "
    section.text += "Where a library cannot be asked, its variable is all there is to go by, and what Linux saw of its registers."
    found: dict[tuple[str, str | None], list[str]] = {}
    for subject, about in record.subjects.items():
        for answer in about.get("runs_on", []):
            found.setdefault((answer["library"], answer["says"]), []).append(subject)
    rows = []
    for library, says in sorted(found, key=lambda key: key[0].lower()):
        by = ", ".join(f"{key}={record.held_by[key]}" for key in isa.BY.get(library, ()) if key in record.held_by)
        verdict = {True: "yes", False: "NO", None: "by its variable" if by else "NOTHING HOLDS IT"}[isa.held(says)]
        rows.append([library, by, says or "cannot be asked", verdict, ", ".join(found[library, says])])
    section.tables.append(Table(["library", "held by", "says", "held", "in the processes of"], rows, "What holds each library"))
    seen = [[subject, _seen(about.get("wide", {}))] for subject, about in record.subjects.items()]
    section.tables.append(Table(["subject", "AVX-512 registers in use when a thread was put aside"], seen, "What Linux saw"))
    return section


def _seen(wide: dict[str, Any]) -> str:
    if wide.get("seen") is None:
        return "cannot be seen here"
    return f"in {wide['seen'] or 'none'} of {wide['turns']} turns"


def _headlines(record: Record) -> Section:
    section = Section(
        "Headline", "How many times as fast as each peer, above 1 being faster: geometric mean over the cases, and the worst of them. "
    )
    section.text += "In brackets the lowest and the highest round. The best peer is the fastest at each shape."
    if _gpus(record):
        section.text += " On a GPU and on the processor there is a best peer each. Copies to a GPU and back are in no ratio."
    groups = [("the whole step, " + d, [f for f in record.figures if f.kind == "step" and f.dtype == d]) for d in ITEMSIZE]
    groups.append(("everything", record.figures))
    kinds = [kind for kind in PASSES if any(f.kind == kind for f in record.figures)]
    folded: list[Table] = []
    for tables, subjects in ((section.tables, _by_default(record)), (folded, _with_out(record))):
        for subject in subjects:
            for name, figures in groups:
                heads = [headline(figures, subject, peer, record.peers) for peer in (*record.peers, "best")]
                rows = [_headline_row(h) for h in heads if h]
                if rows:
                    tables.append(Table(["against", "cases", "geometric mean", "worst", "where"], rows, f"{subject}: {name}"))
        by_pass = [_pass_row(record, subject, kind) for subject in subjects for kind in kinds]
        if by_pass and record.peers:
            tables.append(Table(["subject", "pass", *record.peers, "best peer"], by_pass, "Geometric means by pass"))
    section.folded = {_OUT: folded} if folded else {}
    return section if section.tables or folded else Section("")


_OUT = "The same into preallocated arrays (out=)"


def _by_default(record: Record) -> list[str]:
    return [name for name in record.backends if not name.endswith("-out")]


def _with_out(record: Record) -> list[str]:
    return [name for name in record.backends if name.endswith("-out")]


def _headline_row(h: Headline) -> list[Cell | str]:
    name = "best peer" if h.peer == "best" else h.peer
    return [name, str(h.cases), Cell(_spread(h.mean), h.mean.mid), Cell(_spread(h.worst), h.worst.mid), h.worst_case.name]


def _pass_row(record: Record, subject: str, kind: str) -> list[Cell | str]:
    figures = [f for f in record.figures if f.kind == kind]
    heads = [headline(figures, subject, peer, record.peers) for peer in (*record.peers, "best")]
    return [subject, PASSES[kind], *(Cell(f"{h.mean.mid:.2f}", h.mean.mid) if h else "" for h in heads)]


def _choice(record: Record) -> Section:
    """The opening: a sentence, a picture, and the table for those who want their own shape."""
    rows = advice(record)
    if not rows:
        return Section("")
    section = Section("Which backend to choose here, by size")
    names = choices(record)
    if len(names) == 1:
        section.text = f"Only the {names[0]} backend was measured. "
    for dtype in ITEMSIZE:
        figures = _pictured(record, dtype)
        if figures:
            section.text += _advised(record, figures, dtype)
            section.charts.append(_picture(record, figures, dtype))
    if section.charts:
        section.text += "Each row is a shape, the smallest first. Further right is faster; at the line, as fast as plain NumPy."
    if _gpus(record):
        section.text += " On a GPU the arrays are there already: what copies take is told apart, below."
    table = [
        [
            PASSES[row.case.kind],
            row.case.size,
            row.case.dtype,
            *(_time(row.microseconds[n] * 1e-6) if n in row.microseconds else "" for n in names),
            _fastest_peer(record, row.case),
            row.best if row.clear or len(row.microseconds) == 1 else f"either ({row.best} by {row.ahead - 1:.0%})",
        ]
        for row in rows
    ]
    header = ["pass", "shape", "dtype", *names, "fastest peer", "choose"]
    section.folded = {"The times of every pass, and what to choose for it": [Table(header, table)]}
    return section


def _pictured(record: Record, dtype: str) -> list[Figure]:
    """What the opening shows: whole steps beside plain NumPy, smallest first; where none were measured, all there is."""
    names = choices(record)
    beside = [f for f in record.figures if f.dtype == dtype and BASELINE in f.seconds and any(name in f.seconds for name in names)]
    steps = [f for f in beside if f.kind == "step"]
    order = list(PASSES)
    return sorted(steps or beside, key=lambda f: (order.index(f.kind), f.case.flops, f.case.elements))


def _picture(record: Record, figures: Sequence[Figure], dtype: str) -> str:
    styles, several = _styles(record), len({f.kind for f in figures}) > 1
    rows = []
    for f in figures:
        marks = [(name, ratio(f, name, BASELINE).mid, styles[name]) for name in choices(record) if name in f.seconds]
        peer = best_peer(f, _rivals(record, f))
        if peer:
            marks.insert(0, ("fastest peer", ratio(f, peer, BASELINE).mid, _PEER_STYLE))
        rows.append((f"{f.kind} {f.case.size}" if several else f.case.size, marks))
    title = f"{'Every pass' if several else PASSES[figures[0].kind]}, {dtype}"
    return charts.dots(rows, "times as fast as plain NumPy", "plain NumPy", title)


_PEER_STYLE = 7
"""Hollow, and of no backend's colour."""


def _rivals(record: Record, figure: Figure) -> list[str]:
    """The peers other than plain NumPy that ran where it did."""
    return [peer for peer in record.peers if peer != BASELINE and on_host(figure, peer)]


def _fastest_peer(record: Record, case: Case) -> str:
    figure = next(f for f in record.figures if f.case == case)
    peer = best_peer(figure, [*_rivals(record, figure), BASELINE])
    return f"{peer} {_time(median(figure.seconds[peer]))}" if peer else ""


def _advised(record: Record, figures: Sequence[Figure], dtype: str) -> str:
    """One backend for most sizes, the sizes at which another is clearly faster, what that is worth, and where a peer is faster."""
    cases = {f.case for f in figures}
    best = [row for row in advice(record) if row.case in cases]
    usual = Counter(row.best for row in best).most_common(1)[0][0]
    others: dict[str, list[str]] = {}
    for row in best:
        if row.best != usual and row.clear:
            others.setdefault(row.best, []).append(row.case.size)
    text = f"In {dtype} choose {usual}"
    if others:
        text += ", but " + " and ".join(f"{name} at {_listed(sizes)}" for name, sizes in others.items()) + ". "
    else:
        text += " at every size: " if len(best) > 1 else f" at {best[0].case.size}: "
    head = headline(figures, usual, BASELINE, [BASELINE])
    if head is None:
        return text
    text += f"{usual if others else 'it'} is {head.mean.mid:.2f} times as fast as plain NumPy"
    if head.cases > 1:
        text += f" (geometric mean of {head.cases} shapes), and {head.worst.mid:.2f} times at worst, at {head.worst_case.size}"
    behind = [f.case.size for f in figures if _is_behind(f, usual, best_peer(f, _rivals(record, f)))]
    return text + (f". A peer is faster at {_listed(behind)}. " if behind else ". ")


def _is_behind(figure: Figure, subject: str, peer: str | None) -> bool:
    return peer is not None and subject in figure.seconds and ratio(figure, subject, peer).mid < 1


def _listed(sizes: Sequence[str]) -> str:
    if len(sizes) > _MOST_LISTED:
        return f"{', '.join(sizes[: _MOST_LISTED - 1])} and {len(sizes) - _MOST_LISTED + 1} more"
    return " and ".join(filter(None, (", ".join(sizes[:-1]), sizes[-1])))


_MOST_LISTED = 4


def _heatmaps(record: Record) -> Section:
    section = Section(
        "Ratios by shape", "The peer's time over the subject's, the median of the rounds; blue: the subject is faster, orange: slower."
    )
    folded: list[Table] = []
    for subject in record.backends:
        for dtype in ITEMSIZE:
            figures = [f for kind in PASSES for f in record.figures if f.kind == kind and f.dtype == dtype and subject in f.seconds]
            peers = [peer for peer in record.peers if any(peer in f.seconds for f in figures)]
            rows = [
                [PASSES[f.kind].replace("affine+ReLU ", ""), f.case.size, *(_ratio_cell(f, subject, peer) for peer in peers)]
                for f in figures
            ]
            if peers:
                tables = folded if subject in _with_out(record) else section.tables
                tables.append(Table(["pass", "shape", *peers], rows, f"{subject}, {dtype}"))
    section.folded = {_OUT: folded} if folded else {}
    return section if section.tables or folded else Section("")


def _ratio_cell(figure: Figure, subject: str, peer: str) -> Cell | str:
    if peer not in figure.seconds:
        return ""
    found = ratio(figure, subject, peer)
    return Cell(f"{found.mid:.2f}", found.mid)


def _fortran(record: Record) -> Section:
    """What w in Fortran order costs each subject: its own time in C order over its time there."""
    section = Section("w in Fortran order", "The whole step in C order over the same with w in Fortran order, each subject's own times. ")
    section.text += "Below 1, Fortran order is slower. The two were measured one after the other, not in the same turns."
    steps = {f.case: f for f in record.figures if f.kind == "step"}
    for dtype in ITEMSIZE:
        fortran = [f for f in record.figures if f.kind == "step_fortran" and f.dtype == dtype]
        pairs = [(steps[case], f) for f in fortran if (case := replace(f.case, kind="step")) in steps]
        names = [name for name in record.subjects if any(name in c.seconds and name in f.seconds for c, f in pairs)]
        rows: list[list[Cell | str]] = [[f.case.size, *(_cost_of_layout(c, f, name) for name in names)] for c, f in pairs]
        if names:
            section.tables.append(Table(["shape", *names], rows, dtype))
    return section if section.tables else Section("")


def _cost_of_layout(c_order: Figure, fortran: Figure, subject: str) -> Cell | str:
    if subject not in c_order.seconds or subject not in fortran.seconds:
        return ""
    value = median(c_order.seconds[subject]) / median(fortran.seconds[subject])
    return Cell(f"{value:.2f}", value)


def _throughput(record: Record) -> Section:
    section = Section("Throughput of the whole step against its size")
    if not record.ceilings:
        return Section("")
    section.text = "Each point is a shape. The roofline is the most the machine allows for the FLOPs and the least bytes of that shape."
    section.text += _NOT_THE_GPUS if _gpus(record) else ""
    for dtype in ITEMSIZE:
        figures = sorted((f for f in record.figures if f.kind == "step" and f.dtype == dtype and f.seconds), key=lambda f: f.case.flops)
        if not figures:
            continue
        series = _series(record, figures, lambda f: f.case.flops, lambda f, seconds: f.case.flops / seconds * 1e-9)
        roofs = [(float(f.case.flops), f.case.flops / roof(f.case, record.ceilings).seconds * 1e-9) for f in figures]
        series.append(charts.Series("roofline", roofs, None))
        section.charts.append(charts.lines(series, "FLOP per step", "GFLOP/s", f"Whole step, {dtype}"))
    return section


def _latency(record: Record) -> Section:
    figures = [
        f for f in record.figures if f.kind in ("step", "forward") and f.case.flops < SMALL_FLOPS and f.dtype == "float32" and f.seconds
    ]
    if not figures:
        return Section("")
    styles = _styles(record)
    drawn = [
        charts.bars(
            [(name, median(f.seconds[name]) * 1e6, styles[name]) for name in _drawn(record) if name in f.seconds],
            "µs",
            f"{PASSES[f.kind]}, {f.case.size}",
        )
        for f in sorted(figures, key=lambda f: (f.case.flops, f.kind))
    ]
    return Section("Latency at small sizes", "The time of one call, float32, where calling costs more than the arithmetic.", charts=drawn)


def _memory_bound(record: Record) -> Section:
    section = Section("Bandwidth of the memory-bound passes")
    if not record.ceilings:
        return Section("")
    section.text = "The least bytes of a pass over its time. The ceiling falls where the arrays outgrow a level of cache."
    section.text += _NOT_THE_GPUS if _gpus(record) else ""
    for kind in MEMORY_BOUND:
        figures = [f for f in record.figures if f.kind == kind and f.dtype == "float32" and f.seconds]
        figures.sort(key=lambda f: _bytes(f.case))
        if figures:
            series = _series(record, figures, lambda f: _bytes(f.case), lambda f, seconds: _bytes(f.case) / seconds * 1e-9)
            ceiling = [(float(_bytes(f.case)), roof(f.case, record.ceilings).bandwidth * 1e-9) for f in figures]
            series.append(charts.Series("measured ceiling", ceiling, None))
            section.charts.append(charts.lines(series, "bytes", "GB/s", f"{PASSES[kind]}, float32"))
    return section if section.charts else Section("")


_NOT_THE_GPUS = " It is the processor's and no limit to a GPU, whose ceilings are not measured."


def _gpus(record: Record) -> list[str]:
    """The names of the GPUs on which subjects ran."""
    return sorted({about["device"] for figure in record.figures for about in figure.gpu.values()})


def _gpu(record: Record) -> Section:
    """What the other tables leave out of a GPU's subjects: the host's share of a call, and the copies."""
    section = Section("On the GPU: launches and copies")
    section.text = (
        "A call's time is that between two CUDA events around a batch of calls, over their number (PyTorch's and JAX's by the host's "
        "clock, with one wait at the batch's end); where launching takes longer than the kernels, it is the launching's. The L2 cache is "
        "not emptied between calls. Copied are all inputs, from ordinary NumPy arrays, and all results, after a first time that does not "
        "count. Copies are in no other figure."
    )
    rows = [
        [
            f.case.name,
            subject,
            _time(median(f.seconds[subject])),
            _time(median(about["launch"])),
            "launches" if median(about["launch"]) >= HOST_BOUND * median(f.seconds[subject]) else "the GPU",
            *_copy(about["to_device"]),
            *_copy(about["to_host"]),
        ]
        for kind in PASSES
        for f in record.figures
        if f.kind == kind
        for subject, about in f.gpu.items()
    ]
    header = ["case", "subject", "one call", "launched in", "waits for", "copied there in", "GB/s", "and back in", "GB/s"]
    section.tables.append(Table(header, rows, ", ".join(_gpus(record))))
    return section if rows else Section("")


def _copy(about: dict[str, Any]) -> tuple[str, str]:
    seconds = median(about["seconds"])
    return _time(seconds), f"{about['bytes'] / seconds * 1e-9:.3g}"


def _least_work(record: Record) -> Section:
    """The FLOPs and minimal bytes of every pass, as formulas and at one shape."""
    text = "Every argument read once and every result written once; s bytes per element (4 or 8), k = NM/8 for the keep-set, one bit each. "
    text += "P is the number of parameters of the net."
    n, _d, m = shape = (128, 784, 256)
    formulas = [
        ("affine", shape, "2NDM", "(ND + DM + M) s", "NM s"),
        ("forward", shape, "2NDM", "(ND + DM + M) s", "NM s"),
        ("backward", shape, "4NDM + NM", "(NM + ND + DM) s + k", "(ND + DM + M) s"),
        ("step", shape, "6NDM + NM", "(ND + DM + M + NM) s", "(NM + ND + DM + M) s"),
        ("step_fortran", shape, "6NDM + NM", "(ND + DM + M + NM) s", "(NM + ND + DM + M) s"),
        ("stacked", (8, *shape), "B (6NDM + NM)", "B (ND + DM + M + NM) s", "B (NM + ND + DM + M) s"),
        ("relu_forward", (n, m), "0", "NM s", "NM s"),
        ("relu_backward", (n, m), "0", "2NM s", "NM s"),
        ("db", (n, m), "NM", "NM s", "M s"),
        ("softmax", (n, m), "4NC", "NC s + 8N", "(NC + 1) s"),
        ("infer", (n,), "2N sum of D M", "(784 N + P) s", "10 N s"),
        ("train", (n,), "sum of its passes without the first dx, + 2P", "(784 N + P) s + 8N", "P s"),
    ]
    rows = []
    for kind, at, flops, read, written in formulas:
        case = Case(kind, at, "float32")
        rows.append([PASSES[kind], flops, read, written, case.size, f"{case.flops:,}", f"{case.bytes_read:,}", f"{case.bytes_written:,}"])
    header = ["pass", "FLOP", "bytes read", "bytes written", "e.g. float32", "FLOP", "read", "written"]
    return Section("FLOPs and least bytes of each pass", text, [Table(header, rows)])


def _everything(record: Record) -> Section:
    """Every case: what bounds it, and each subject's time as a share of that."""
    section = Section("All figures", "The time of one call, the median over rounds")
    section.text += ", and the share of the roofline that it reaches." if record.ceilings else "."
    section.text += " The roofline is the processor's: a subject on a GPU has no share of it." if record.ceilings and _gpus(record) else ""
    figures = [f for kind in PASSES for f in record.figures if f.kind == kind and f.seconds]
    limits = ["roofline", "bound by"] if record.ceilings else []

    def table(names: Sequence[str]) -> Table:
        return Table(
            ["case", *limits, *names], [[f.case.name, *_bound(record, f.case), *(_share(record, f, n) for n in names)] for f in figures]
        )

    section.tables.append(table(_drawn(record)))
    section.folded = {_OUT: [table(_with_out(record))]} if _with_out(record) else {}
    return section if figures else Section("")


def _bound(record: Record, case: Case) -> list[str]:
    if not record.ceilings:
        return []
    limit = roof(case, record.ceilings)
    return [_time(limit.seconds), limit.bound]


def _share(record: Record, figure: Figure, subject: str) -> str:
    if subject not in figure.seconds:
        return ""
    seconds = median(figure.seconds[subject])
    if not record.ceilings or not on_host(figure, subject):
        return _time(seconds)
    return f"{_time(seconds)} ({roof(figure.case, record.ceilings).seconds / seconds:.0%})"


def _machine(record: Record) -> Section:
    facts = [[key, _fact(value)] for key, value in {**record.machine, **record.settings, "started": record.started}.items()]
    facts += [["GPU", name] for name in _gpus(record)] + [["took", f"{record.seconds:.0f} s"]]
    section = Section(
        "Machine and method", "Every subject in its own process; they take turns, round by round; figures are medians over rounds."
    )
    section.tables.append(Table(["what", "value"], facts))
    if record.ceilings:
        rows = [[f"peak {dtype}", f"{rate * 1e-9:.4g} GFLOP/s", ""] for dtype, rate in record.ceilings["flops"].items()]
        for level in record.ceilings["levels"]:
            name = f"{level['level']}, {level['footprint'] / 2**10:,.0f} KiB"
            rows.append([name, f"{level['read'] * 1e-9:.4g} GB/s read", f"{level['copy'] * 1e-9:.4g} GB/s read+write ({level['copy_by']})"])
        section.tables.append(
            Table(["ceiling", "", ""], rows, f"Measured ceilings, {record.ceilings['threads']} threads: {record.ceilings['probe']}")
        )
    rows = [
        [
            name,
            about["about"],
            _fact(about.get("versions", {})),
            "; ".join(map(_fact, about.get("threads", []))),
            f"{about.get('idle_cpu', 0):.1%}",
        ]
        for name, about in record.subjects.items()
    ]
    section.tables.append(Table(["subject", "what", "versions", "BLAS, threads", "CPU while others measured"], rows, "Subjects"))
    return section


def _absent(record: Record) -> Section:
    section = Section("Left out")
    if record.missing:
        section.tables.append(Table(["subject", "why"], list(record.missing.items()), "Missing here"))
    notes = [[name, about["note"]] for name, about in record.subjects.items() if about.get("note")]
    if notes:
        section.tables.append(Table(["subject", "why"], notes, "In some passes only"))
    if record.left_out:
        rows = [[entry["case"], entry["subject"], entry["reason"]] for entry in record.left_out]
        section.tables.append(Table(["case", "subject", "why"], rows, "Cases not measured"))
    return section


# ---------------------------------------------------------------- small words


def _styles(record: Record) -> dict[str, int]:
    return {name: i for i, name in enumerate(record.subjects)}


def _drawn(record: Record) -> list[str]:
    """Whom charts show: everyone as called by default, in the order of the subjects."""
    return [name for name in record.subjects if name not in _with_out(record)]


def _series(record: Record, figures: Sequence[Figure], x: Any, y: Any) -> list[charts.Series]:
    made = [
        charts.Series(name, [(float(x(f)), y(f, median(f.seconds[name]))) for f in figures if name in f.seconds], style)
        for name, style in _styles(record).items()
        if name in _drawn(record)
    ]
    return [series for series in made if series.points]


def _bytes(case: Case) -> int:
    return case.bytes_read + case.bytes_written


def _spread(s: Spread) -> str:
    return f"{s.mid:.2f} ({s.low:.2f} to {s.high:.2f})"


def _time(seconds: float) -> str:
    for factor, unit in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v // 1024:,} KiB" if k in ("L1", "L2", "L3") else f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _title(record: Record) -> str:
    held = "" if record.isa == "host" else f", held to {record.isa.upper()}"
    return f"rectilinear on {record.machine.get('cpu', 'this machine')}{held}"


def _subtitle(record: Record) -> str:
    return ", ".join(f"{key}: {value}" for key, value in {"measured": record.started, **record.settings}.items())


def html(record: Record) -> str:
    """The report as one page that needs no network."""
    return page.html(_title(record), _subtitle(record), sections(record))


def markdown(record: Record) -> str:
    """The tables of the page."""
    return page.markdown(_title(record), _subtitle(record), sections(record))
