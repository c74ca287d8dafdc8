"""What a run has measured, as it is saved: plain data, JSON, written anew after each case so that an interrupted run loses nothing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rectilinear.measure.cases import Case

FORMAT = 1


@dataclass
class Figure:
    """One case: for each subject its seconds per call, one figure per round.

    `gpu` has those of them that ran on a GPU: ``{"device": its name, "launch": the host's seconds per call, one figure per round,
    "to_device" and "to_host": {"bytes", "seconds": of each try}}``. Copies are in no other figure.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    seconds: dict[str, list[float]]
    gpu: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def case(self) -> Case:
        return Case(self.kind, tuple(self.shape), self.dtype)


@dataclass
class Record:
    """A run. `ceilings` is empty where they were not measured; `left_out` and `refused` hold {case, subject, reason}.

    `held_by` has the variables by which the subjects were held to ``settings["isa"]``; none where that is ``"host"``.
    """

    started: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    subjects: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    held_by: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    seconds: float = 0.0
    others: float | None = None
    """Processors that other programs kept busy meanwhile, on average; None where the system does not say."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file beside `path` and rename it, so that `path` is valid JSON at every moment."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        beside.replace(path)

    @property
    def isa(self) -> str:
        """The instruction set of every subject; records from before there was a choice have the host's."""
        return str(self.settings.get("isa", "host"))

    @property
    def backends(self) -> list[str]:
        """The subjects that are rectilinear, in the order in which they ran."""
        return [name for name, about in self.subjects.items() if about["backend"]]

    @property
    def peers(self) -> list[str]:
        return [name for name, about in self.subjects.items() if not about["backend"]]


def load(path: str | os.PathLike[str]) -> Record:
    """Read what `Record.save` wrote.

    Raises
    ------
    ValueError
        The file is not JSON, or not of this format.
    """
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = data.pop("format", None) if isinstance(data, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads format {FORMAT}: measure anew, or use the version that wrote it")
    data["figures"] = [Figure(f["kind"], tuple(f["shape"]), f["dtype"], f["seconds"], f.get("gpu", {})) for f in data["figures"]]
    return Record(**data)
