"""`make torture`: kills, full disks, broken numbers and bad input, in one table, whose columns of faults are to be 0.

    python tests/torture/run.py [--part kills|events|disks|nan|bad-input] [--only NAME] [--scale 0.1] [--out FOLDER]

Real processes throughout, forked from this one, which has imported what they need. Seeds are fixed. What failed is in
FOLDER/failed, a file for each case, with its command lines and what they printed; FOLDER/table.md is the table.
Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "assets"))
# before torch is imported, here and in every child
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_COLOR": "1"}
os.environ |= {"TERM": "dumb", "COLUMNS": "100", "TOKENIZERS_PARALLELISM": "false"}

import bad_input  # noqa: E402 it imports what needs the path
import children  # noqa: E402
import disks  # noqa: E402
import events  # noqa: E402
import kills  # noqa: E402
import materials  # noqa: E402
import not_finite  # noqa: E402
from cases import CODE, KINDS, Case, Fault, Report  # noqa: E402

PARTS = {
    "kills": kills.cases,
    "events": events.cases,
    "disks": disks.cases,
    "nan": not_finite.cases,
    "bad-input": bad_input.cases,
}
LANES = 2
_cases: list[Case] = []
_work = Path()


def main() -> None:
    """Run the parts that were asked for, print the table."""
    global _work
    asked = arguments()
    parts = {name: make for name, make in PARTS.items() if not asked.part or name in asked.part}
    began = time.monotonic()
    # those of the last time
    shutil.rmtree(asked.out / "failed", ignore_errors=True)
    (asked.out / "failed").mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        _work = Path(folder).resolve()
        os.environ |= {"LOWRANK_CACHE": str(_work / "cache"), "TORCH_EXTENSIONS_DIR": str(_work / "extensions")}
        os.environ |= {"HF_HOME": str(_work / "hub"), "MPLCONFIGDIR": str(_work / "mpl"), "HOME": str(_work)}
        (_work / "materials").mkdir()
        warm()
        made = materials.write(_work / "materials")
        note(f"materials made after {time.monotonic() - began:.0f} s")
        children.MORE += ["--debug"] * asked.debug
        for make in parts.values():
            _cases.extend(make(made, asked.scale))
        if asked.only:
            _cases[:] = [case for case in _cases if any(only in f"{case.row} {case.name}" for only in asked.only)]
        reports = carry_out(asked.out / "failed", asked.lanes)
    table = rendered(reports)
    (asked.out / "table.md").write_text(table)
    print(table)
    failed = sum(bool(report.faults) for report in reports)
    note(f"{len(_cases)} cases, {failed} failed, {(time.monotonic() - began) / 60:.0f} minutes; see {asked.out}")
    sys.exit(failed > 0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A campaign against the command: about 20 minutes on two cores.")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="all unless given")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose row and name contain this")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the cases (1)")
    parser.add_argument("--debug", action="store_true", help="add --debug to every line: where its errors arise")
    parser.add_argument("--lanes", type=int, default=LANES, help=f"cases at the same time ({LANES})")
    parser.add_argument(
        "--out", type=Path, default=Path("build/torture"), help="folder of what failed (build/torture)"
    )
    return parser.parse_args()


def warm() -> None:
    """Import what every child needs, and leave out what takes half of a tiny run and is tested elsewhere."""
    import lowrank_cli.train.prepare  # noqa: F401
    from lowrank_cli import run
    from lowrank_cli.train import finish

    finish.estimated_memory = lambda session: {}
    run.git_commit = lambda: None


def carry_out(failed: Path, lanes: int) -> list[Report]:
    """Run every case, some at the same time; returns how each went, in the order of the cases."""
    reports: list[Report | None] = [None] * len(_cases)
    with multiprocessing.get_context("fork").Pool(lanes) as pool:
        for number, (i, report) in enumerate(pool.imap_unordered(carry_out_one, range(len(_cases))), 1):
            reports[i], case = report, _cases[i]
            if report.faults:
                text = "\n\n".join(f"{f.kind}: {f.what}\n{f.shown}" for f in report.faults)
                (failed / f"{case.place}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
            for fault in report.faults:
                note(f"{case.part} | {case.row} | {case.name}: {fault.kind}: {fault.what}")
            if number % 50 == 0:
                note(f"{number} of {len(_cases)} cases")
    return reports


def carry_out_one(i: int) -> tuple[int, Report]:
    """Run one case in a folder of its own."""
    folder = _work / f"case-{i}"
    folder.mkdir()
    try:
        return i, _cases[i].run(folder)
    except Exception as error:  # noqa: BLE001 a mistake of the campaign must not end it
        return i, Report(faults=[Fault(CODE, f"the campaign itself: {type(error).__name__}: {error}", "")])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rendered(reports: list[Report]) -> str:
    """Return the table in Markdown."""
    rows: dict[tuple[str, str], Counter] = {}
    for case, report in zip(_cases, reports, strict=True):
        row = rows.setdefault((case.part, case.row), Counter())
        row["cases"] += 1
        row["strokes"] += report.strokes
        row.update({fault.kind for fault in report.faults})
    total = Counter()
    for row in rows.values():
        total.update(row)
    columns = ("cases", "strokes", *KINDS)
    lines = [f"| part | of | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for (part, of), row in [*rows.items(), (("all", ""), total)]:
        lines.append(f"| {part} | {of} | {' | '.join(str(row[c]) for c in columns)} |")
    return "\n".join(lines) + "\n"


def note(text: str) -> None:
    """Say how far it is."""
    print(ascii(text)[1:-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
