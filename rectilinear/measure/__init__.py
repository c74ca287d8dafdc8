"""What ``python -m rectilinear bench`` runs: subjects, ceilings, turns, report. One file each:

- `cases`: what is measured, and the FLOPs and minimal bytes of each pass;
- `reference`: inputs, the exact results in float64, and the check of what a subject computed;
- `ours` and `peers/`: the subjects, rectilinear's backends and other libraries; `subjects` is their list;
- `gpu`: how a subject on a GPU is timed, and its copies apart;
- `worker`: one subject in its own process; `turns`: the parent that lets the processes take turns;
- `isa`: the instruction set that a run holds them to, and what they say they run on;
- `ceilings`: the machine's peak FMA rate and memory bandwidth; `machine`: what the machine is;
- `figures`: medians, ratios and rooflines from what was measured; `compare`: two runs against one another;
- `report`, `page`, `charts`, `run`, `cli`: a whole run, and what people see of it. `record` is what is saved.

Nothing here is imported by ``import rectilinear``.
"""
