"""Compare what this checkout computes with what another revision does, bit for bit: `compare.py main~1`.

Both trees run the same command lines, side by side: every method in every mode, checkpoints of the other revision
resumed by this one, help texts and presets. Prints a line for each group, then `equal`, or the first difference.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "assets"))

import plan  # noqa: E402 it imports made_text
from plan import Files, Line  # noqa: E402

SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "100",
            "TERM": "dumb", "NO_COLOR": "1"}  # fmt: skip
# what a command line says of a flag, method or preset that its tree does not have
UNKNOWN = re.compile(r"error: (no option|no method|no preset|no setting|No such command|--\S+ is an option of)")


@dataclass
class Outcome:
    """What a command line came to in a tree."""

    tree: str
    code: int
    out: str
    err: str
    folder: Path

    @property
    def lacks(self) -> bool:
        """Whether the tree does not know something that the line names."""
        return self.code == 2 and UNKNOWN.search(self.err) is not None

    @property
    def error(self) -> str:
        """The lines of an error, without what was said before it."""
        return self.err[max(0, self.err.find("error: ")) :]

    def losses(self) -> dict[str, float]:
        """Return every loss that the run has reported, by its step."""
        file = self.folder / "run" / "metrics.jsonl"
        reports = map(json.loads, file.read_text().splitlines()) if file.is_file() else ()
        return {f"{k} of step {r['step']}": r[k] for r in reports for k in ("loss", "eval_loss") if k in r}


class Tree:
    """A checkout and the process that runs command lines of it."""

    def __init__(self, name: str, root: Path, work: Path):
        work.mkdir()
        self.name, self.root, self.work = name, root, work
        own = {
            "PYTHONPATH": str(root),
            "LOWRANK_CACHE": str(work / "cache"),
            "TORCH_EXTENSIONS_DIR": str(work / "ext"),
        }
        self.worker = subprocess.Popen(
            [sys.executable, HERE / "worker.py", root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=work,
            env={**os.environ, **SETTINGS, **own},
            start_new_session=True,
        )

    def receive(self) -> dict:
        """Return the worker's next answer."""
        answer = self.worker.stdout.readline()
        if not answer:
            sys.exit(f"the worker of {self.name} has ended with exit code {self.worker.wait()}")
        return json.loads(answer)

    def folder(self, line: Line) -> Path:
        """Return the folder that a line runs in."""
        return self.work / re.sub(r"[^\w./-]+", "_", f"{line.group}/{line.name}")

    def start(self, line: Line) -> None:
        """Begin a command line."""
        self.folder(line).mkdir(parents=True, exist_ok=True)
        request = {"argv": line.text.split(), "folder": str(self.folder(line)), "ranks": line.ranks}
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()

    def outcome(self, line: Line) -> Outcome:
        """Return what the line that was started came to."""
        answer, folder = self.receive(), self.folder(line)
        for place, name in ((folder, "FOLDER"), (self.work, "WORK"), (self.root, "TREE")):
            answer |= {key: answer[key].replace(str(place), name) for key in ("out", "err")}
        return Outcome(self.name, **answer, folder=folder)

    def close(self) -> None:
        """End the worker and what it has started."""
        os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker.wait()


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """Have a git worktree of a revision until the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    try:
        added = subprocess.run([*git, "add", "--detach", folder, revision], capture_output=True, text=True)
        if added.returncode:
            sys.exit(added.stderr.strip())
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", folder], capture_output=True)


def shared(here: dict, there: dict, names: tuple[str, str]) -> dict:
    """Return what both inventories have; says what only one has."""
    both = {}
    for kind, own in here.items():
        other = there[kind]
        for mine, theirs, name in ((own, other, names[0]), (other, own, names[1])):
            only = [" ".join(x) if isinstance(x, list) else x for x in mine if x not in theirs]
            if only:
                print(f"only in {name}: {kind} {', '.join(only)}")
        kept = [x for x in own if x in other]
        both[kind] = kept if isinstance(own, list) else {x: in_both(own[x], other[x]) for x in kept}
    return both


def in_both(a, b):
    """Return the entries of a list that another one has too; an option's choices that both have."""
    if isinstance(a, dict):
        return a | {"choices": in_both(a["choices"], b["choices"])}
    return [x for x in a if x in b] if isinstance(a, list) else a


@dataclass
class Comparison:
    """The two trees, and what has been found so far."""

    here: Tree
    there: Tree
    quick: bool
    only: str
    counts: dict[str, Counter] = field(default_factory=dict)
    first: str = ""
    lacking: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def wants(self, line: Line) -> bool:
        """Whether a line is among those that were asked for."""
        pair = "+" in line.name
        return (not self.quick or (line.group in plan.QUICK and not pair)) and bool(
            re.search(self.only, f"{line.group} {line.name}")
        )

    def both(self, line: Line) -> tuple[Outcome, Outcome]:
        """Run a line in both trees at once and compare."""
        for tree in (self.there, self.here):
            tree.start(line)
        there, here = self.there.outcome(line), self.here.outcome(line)
        self.note(line, there, here)
        return there, here

    def resume(self, line: Line, there: Outcome) -> None:
        """Have this tree go on from a checkpoint in the middle of the other tree's run."""
        resumed = replace(line, group="resume", text=f"{line.text.split()[0]} --resume run/checkpoints/step-000010")
        run = self.here.folder(resumed) / "run"
        shutil.copytree(there.folder / "run", run)
        shutil.rmtree(run / "model")
        self.here.start(resumed)
        self.note(resumed, there, self.here.outcome(resumed))

    def note(self, line: Line, there: Outcome, here: Outcome) -> None:
        """Count a line's outcome and keep the first difference."""
        count, where = self.counts.setdefault(line.group, Counter()), f"{line.group}, {line.name}"
        if there.lacks != here.lacks:
            result, lacking = "in one tree only", there if there.lacks else here
            self.lacking.append(f"not in {lacking.tree}: {where}: {lacking.error.splitlines()[0]}")
        elif text := difference(line, there, here):
            result = "different"
            self.first = self.first or f"{where}\nlowrank {line.text}\n{text}"
        else:
            result = "equal" if here.code == 0 else "refused alike"
            if here.code:
                self.refused.append(f"{where}: {here.error.splitlines()[0] if here.error else here.code}")
        count[result] += 1

    def report(self, group: str) -> None:
        """Print a group's counts."""
        count = self.counts.get(group)
        if count:
            print(f"{group:20} {count.total():3} runs: {', '.join(f'{n} {r}' for r, n in count.items())}", flush=True)

    def run(self, data: Path, both: dict) -> None:
        """Run and compare everything."""
        models = [self.there.work / "base" / name / "run" / "model" for name in ("pretrain", "compress")]
        files = Files.write(data, *models)
        for line in plan.base_lines(files):
            outcomes = self.both(line)
            if any(outcome.code for outcome in outcomes):
                sys.exit("\n".join(f"{o.tree}: lowrank {line.text}\n{o.err}" for o in outcomes))
        self.report("base")
        group = ""
        for line in filter(self.wants, plan.lines(both, files)):
            if group and line.group != group:
                self.report(group)
            group = line.group
            there, here = self.both(line)
            if group == "plain" and there.code == here.code == 0:
                self.resume(line, there)
            for outcome in (there, here):
                shutil.rmtree(outcome.folder)
        for last in (group, "resume"):
            self.report(last)


def difference(line: Line, there: Outcome, here: Outcome) -> str:
    """Return what differs between two outcomes of a line, in full; nothing if they are equal."""
    if there.code != here.code:
        return "\n".join(f"{o.tree}: exit code {o.code}\n{o.error.strip()}" for o in (there, here))
    if there.code:
        return text_difference(there.error, here.error, there.tree, here.tree)
    if line.prints:
        return text_difference(there.out, here.out, there.tree, here.tree)
    return loss_difference(there, here) or model_difference(there, here)


def text_difference(a: str, b: str, *names: str) -> str:
    """Return a unified diff."""
    return "\n".join(difflib.unified_diff(a.splitlines(), b.splitlines(), *names, lineterm=""))


def loss_difference(there: Outcome, here: Outcome) -> str:
    """Return the first step whose loss is another one."""
    a, b = there.losses(), here.losses()
    for step in a | b:
        if a.get(step) != b.get(step):
            found = [f"{o.tree}: {n!r} {n.hex() if n else ''}" for o, n in ((there, a.get(step)), (here, b.get(step)))]
            return f"the {step} of {len(a)} losses differs\n" + "\n".join(found)
    return ""


def model_difference(there: Outcome, here: Outcome) -> str:
    """Return the first tensor of the written models that is another one."""
    a, b = (tensors(o.folder / "run" / "model") for o in (there, here))
    if not a:
        return f"{there.tree} has written no model"
    if a.keys() != b.keys():
        return f"other tensors are written: {', '.join(sorted(a.keys() ^ b.keys()))}"
    for name, tensor in a.items():
        if (tensor.dtype, tensor.shape) != (b[name].dtype, b[name].shape):
            return f"{name}: {tensor.dtype} {list(tensor.shape)}, now {b[name].dtype} {list(b[name].shape)}"
        if bits(tensor).ne(bits(b[name])).any():
            return f"the losses are equal, the tensor {name} differs: {apart(tensor, b[name])}"
    return ""


def tensors(folder: Path) -> dict:
    """Return every tensor of a written model, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor):
    """Return a tensor's numbers as whole numbers in their order, so that neighbours are 1 apart."""
    import torch

    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    number = tensor.contiguous().view(whole).to(torch.int64)
    # floats have a sign and a magnitude
    return number.where(number >= 0, torch.iinfo(whole).min - number) if tensor.is_floating_point() else number


def apart(a, b) -> str:
    """Return how far two tensors of one shape are apart."""
    distance, ulps = (a.double() - b.double()).abs(), (bits(a) - bits(b)).abs()
    at = int(distance.argmax())
    return (
        f"max abs difference {float(distance.max()):.3g} ({a.flatten()[at].item()!r}, now {b.flatten()[at].item()!r}: "
        f"{int(ulps.flatten()[at])} ulp), at most {int(ulps.max())} ulp, "
        f"in {int(ulps.count_nonzero())} of {a.numel()} numbers"
    )


def compare(revision: str, quick: bool, only: str) -> int:
    """Compare this working tree with a revision; returns the exit code."""
    begin = time.monotonic()
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="golden-")))
        other = ends.enter_context(checked_out(revision, folder / "tree"))
        trees = []
        for name, root, work in ((revision, other, "there"), ("this checkout", ROOT, "here")):
            trees.append(Tree(name, root, folder / work))
            ends.callback(trees[-1].close)
        there, here = trees
        inventories = [tree.receive() for tree in (here, there)]
        comparison = Comparison(here, there, quick, only)
        comparison.run(folder, shared(*inventories, (here.name, there.name)))
    for title, lines in (("refused alike", comparison.refused), ("in one tree only", comparison.lacking)):
        if lines:
            print(f"{title}:", *lines, sep="\n  ")
    print(f"{time.monotonic() - begin:.0f} s")
    different = sum(count["different"] for count in comparison.counts.values())
    if different:
        print(f"first difference: {comparison.first}\n{different - 1} others")
        return 1
    print("equal")
    return 0


def write_losses() -> int:
    """Write the losses of tests/golden/losses.txt anew."""
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "test_golden.py"]
    return subprocess.run(test, cwd=ROOT, env={**os.environ, **SETTINGS, "GOLDEN_WRITE": "1"}).returncode


def main() -> int:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", metavar="REV", help="what to compare with, such as main~1")
    parser.add_argument("--only", default="", metavar="PATTERN", help="groups and names that match: 'plain.*galore'")
    parser.add_argument("--quick", action="store_true", help="single methods, one process, the plain modes")
    parser.add_argument("--write", action="store_true", help="write losses.txt anew instead")
    given = parser.parse_args()
    if given.write == bool(given.revision):
        parser.error("give a revision, or --write")
    return write_losses() if given.write else compare(given.revision, given.quick, given.only)


if __name__ == "__main__":
    # so that a kill cleans up as Ctrl-C does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
