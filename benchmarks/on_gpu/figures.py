"""What the parts found: a file of JSON lines, one for each figure as soon as there is one, and the table of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import harness

FILE, TABLE = "gpu.jsonl", "gpu.md"
DONE, FAILED = "done", "failed"
HEADER = ["part", "figure", "value", "goal", "holds"]
MISSED = 2  # of a part's missed goals, so many are named in the short table
SHOWN = {"ms": lambda value: f"{value * 1000:.2f} ms", "MB": lambda value: f"{value / 2 ** 20:.0f} MB",
         "%": lambda value: f"{value:.2%}", "s": lambda value: f"{value:.1f} s", "": lambda value: f"{value:.3g}"}


def write_line(folder: Path, line: dict) -> None:
    """Add one line at once, since several processes may write to the file."""
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")


def read_lines(folder: Path) -> list[dict]:
    """All lines so far; the last one may be cut where a process was ended."""
    file, lines = folder / FILE, []
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


@dataclass
class Work:
    """What a part works with.

    Attributes:
        part: its name.
        small: small models, for a machine without a GPU and for a first try on one.
        pack: the pack and ComfyUI's nodes.
        folder: of the figures; in ``compared`` parts leave what others compare with.
    """

    part: str
    small: bool
    pack: harness.Pack
    folder: Path

    def note(self, figure: str, value: float | bool | str | None, unit: str = "", most: float | None = None,
             wanted: bool | None = None, brief: str = "", **more) -> None:
        """Write a figure down.

        Args:
            value: in seconds, bytes or as a share of 1.
            unit: a key of ``SHOWN``.
            most: the goal of a number, which holds up to it.
            wanted: the goal of a truth.
            brief: its name in the short table, for those that stand there.
            more: whatever explains the figure.
        """
        holds = None
        if most is not None:
            holds = value is not None and value <= most
        if wanted is not None:
            holds = value == wanted
        write_line(self.folder, {"part": self.part, "figure": figure, "value": value, "unit": unit, "most": most,
                                 "wanted": wanted, "holds": holds, "brief": brief, **more})

    def beside_others(self, name: str, make: Callable, apart: Callable) -> float | None:
        """How far something is from what the first part that asked for ``name`` made of it; None for that part.

        Args:
            make: gives a tensor.
            apart: (it, the first one) -> number.
        """
        import torch
        made = make().detach().cpu()
        file = self.folder / "compared" / f"{name}.pt"
        file.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            own = Path(folder) / "own.pt"
            torch.save(made, own)
            try:
                os.link(own, file)  # whole at once, for other parts may ask at the same time
            except FileExistsError:
                return apart(made, torch.load(file, weights_only=True))
        return None


def latest(lines: list[dict]) -> dict[str, list[dict]]:
    """{part: the lines of its last run}."""
    runs: dict[str, list[dict]] = {}
    for line in lines:
        run = runs.setdefault(line["part"], [])
        if run and "state" in run[-1]:
            run.clear()
        run.append(line)
    return runs


def rows_of(lines: list[dict]) -> list[list[str]]:
    """Rows under HEADER: the figures, and the parts that ended otherwise than done."""
    rows = []
    for line in (line for run in latest(lines).values() for line in run):
        if "figure" in line:
            rows.append([line["part"], line["figure"], _shown(line["value"], line["unit"]), _goal(line),
                         {None: "", True: "yes", False: "NO"}[line["holds"]]])
        elif line["state"] != DONE:
            rows.append([line["part"], "", line["state"], "", "NO"])
    return rows


def short_table(lines: list[dict]) -> str:
    """A line for each part: how it ended, how many of its goals held, its figures, and what was missed."""
    table = [f"{'part':22} {'ended':8} {'goals held':12} figures"]
    for part, run in latest(lines).items():
        figures = [line for line in run if "figure" in line]
        goals = [line for line in figures if line["holds"] is not None]
        missed = [line for line in goals if not line["holds"]]
        found = [f"{line['brief']} {_shown(line['value'], line['unit'])}" for line in figures if line["brief"]]
        found += [f"MISSED: {line['figure']} {_shown(line['value'], line['unit'])}" for line in missed[:MISSED]]
        held = f"{len(goals) - len(missed)} of {len(goals)}"
        table.append(f"{part:22} {run[-1].get('state', 'not ended'):8} {held:12} {', '.join(found)}".rstrip())
    return "\n".join(table)


def _shown(value, unit: str) -> str:
    if value is None or isinstance(value, (bool, str)):
        return {None: "-", True: "yes", False: "no"}.get(value, value)
    return SHOWN[unit](value)


def _goal(line: dict) -> str:
    if line["most"] is not None:
        return f"<= {_shown(line['most'], line['unit'])}"
    return _shown(line["wanted"], "") if line["wanted"] is not None else ""
