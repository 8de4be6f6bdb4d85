"""The records of a run, which rank 0 appends to in run.directory: opened at the step that the run goes on from, cut back to it,
and described for the next checkpoint. It measures and judges nothing.

A checkpoint of step k keeps how long each ledger was when it held the rows of all steps before k, and the same of the segment
of rollouts that was written then. A resumed run cuts each there and drops later segments: what that costs depends on the rows
since the checkpoint and not on the age of the run. Where a ledger is not what the checkpoint says (somebody edited it, or an
older version wrote the checkpoint), the place is found by reading back from its end, with a note; a line on the way that is no
row, or one of those that stay and are read, is a CheckpointError before any is cut.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.load import RunConfig, dump_config
from engine.core.errors import CheckpointError
from engine.core.jsonl import JsonlLedger, read_lines, require_names, require_numbers, row_of, step_of
from engine.core.segment_cut import adopt, cut_back, find_cut
from engine.observe.guard import Finding, Guard
from engine.observe.rollouts import ROLLOUTS, ROLLOUTS_FILE
from engine.observe.summary import EVALUATION
from engine.observe.writing import MetricsWriter, write_json, write_text
from engine.rollouts.writer import RolloutFolder, RolloutWriter

VERSIONS_FILE = "versions.json"  # what the engines run with
JUDGED = ("evaluations", "samples")  # what an evaluation adds to, after the checkpoint of its step


class Records:
    """The ledgers, the guard that watches the metrics, and what was judged so far."""

    rollouts: RolloutWriter  # opened once they are cut back

    def __init__(self, directory: Path, guard: Guard) -> None:
        self._directory = directory
        self.guard = guard
        self.metrics = MetricsWriter(directory)
        self.evaluations = JsonlLedger(directory / "evaluations.jsonl")
        self.samples = JsonlLedger(directory / "samples.jsonl")
        self._findings = JsonlLedger(directory / "guard.jsonl")
        self._ledgers = {
            "metrics": self.metrics.ledger,
            "evaluations": self.evaluations,
            "samples": self.samples,
            "guard": self._findings,
        }
        self.judged: list[dict[str, Any]] = []  # rows of evaluations.jsonl without their `records`; see `kept`
        self.notes: list[str] = []  # what somebody should know of how they were opened

    @classmethod
    def open(cls, config: RunConfig, step: int, kept: Mapping[str, Any] | None) -> Records:
        """The records of a run that goes on after `step` steps, cut back to them. `kept`: what `Records.kept` gave to the
        checkpoint; None without one, or with one of an older version. CheckpointError names a ledger that cannot be cut, or of
        which what stays cannot be read; then none is cut."""
        directory = config.run_directory
        write_text(directory / "config.toml", dump_config(config))
        records = cls(directory, Guard(config.guard))
        try:
            records._go_on(step, kept, judges_again=step == 0 or config.evaluation_due(step))
        except BaseException:
            records._close_ledgers()
            raise
        records.rollouts = RolloutWriter(RolloutFolder(directory / ROLLOUTS, config.records))
        return records

    def _go_on(self, step: int, kept: Mapping[str, Any] | None, *, judges_again: bool) -> None:
        """Cuts every ledger back to `step`, once all that is wanted of them has been found and read. `judges_again`: else what
        was judged at the checkpoint stands."""
        if kept is None and step:
            self.notes.append(
                f"the checkpoint of step {step} does not say how long the records were: their ends, and all evaluations and "
                f"metrics, are read instead"
            )
        begins = {
            name: self._begin(ledger, step, kept["bytes"][name] if kept is not None else None)
            for name, ledger in self._ledgers.items()
        }
        ends = begins | ({} if judges_again else {name: _end(self._ledgers[name], begins[name], step) for name in JUDGED})
        self._recall(begins["evaluations"], ends["evaluations"], kept)
        if kept is not None:
            self.guard.restore(kept["guard"])
        else:
            for row in _rows(self.metrics.ledger, 0, ends["metrics"]):
                self.guard.observe(row)
        folder = self._directory / ROLLOUTS
        adopt(self._directory / ROLLOUTS_FILE, folder)
        cut = find_cut(folder, step, _rollouts_of(kept), CheckpointError)
        if cut.note is not None:
            self.notes.append(cut.note)
        cut_back(folder, cut)
        for name, end in ends.items():
            self._ledgers[name].cut(end)

    def _begin(self, ledger: JsonlLedger, step: int, known: int | None) -> int:
        """Where the rows of `step` and later begin; `known`: where the checkpoint says."""
        if known is not None and ledger.splits(known, step, CheckpointError):
            return known
        if step == 0:
            return 0
        found = ledger.find(step, CheckpointError)
        if known is not None:
            self.notes.append(
                f"{ledger.path} was changed: by the checkpoint, step {step} begins at byte {known}; found it at {found}"
            )
        return found

    def _recall(self, begin: int, end: int, kept: Mapping[str, Any] | None) -> None:
        """Finds what was judged: in the checkpoint, and in the ledger what came after it and stays, from `begin` to `end`."""
        known = kept["judged"] if kept is not None else ()
        rows = _rows(self.evaluations, begin if kept is not None else 0, end, **EVALUATION)
        self.judged = [{name: value for name, value in row.items() if name != "records"} for row in (*known, *rows)]

    def kept(self, checkpoints: Collection[int]) -> dict[str, Any]:
        """What the next checkpoint keeps of the records, as JSON holds it: every ledger's length and where the rollouts end,
        once they are on disk; the guard's state; and what was judged at step 0 and at the steps of `checkpoints`, which later
        ones are held against."""
        return {
            "rollouts": self.rollouts.sync(),
            "bytes": {name: ledger.sync() for name, ledger in self._ledgers.items()},
            "guard": self.guard.state(),
            "judged": [row for row in self.judged if row["step"] == 0 or row["step"] in checkpoints],
        }

    def engines_run_with(self, versions: Mapping[str, str], *, resumed: bool) -> str:
        """Writes down what the engines run with, before anything is sampled; of a resumed run a sentence on what was another
        before, empty where nothing was."""
        path = self._directory / VERSIONS_FILE
        before: Any
        try:
            before = json.loads(path.read_text("utf-8")) if resumed else {}
        except FileNotFoundError:
            write_json(path, versions)
            return "what engines ran with before is not on record: where it was not the same, equal seeds give other tokens"
        except ValueError:
            before = None
        write_json(path, versions)
        if not isinstance(before, dict):
            before = dict.fromkeys(versions, "something that cannot be read")
        changed = [f"{name} {before[name]} before, {now} now" for name, now in versions.items() if before.get(name, now) != now]
        told = f"engines do not run with what they did before ({', '.join(changed)}): equal seeds may give other tokens"
        return told if changed else ""

    def judge(self, summary: dict[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        """Writes an evaluation down: its figures, and what each problem came to."""
        self.judged.append(summary)
        self.evaluations.append([summary | {"records": records}])

    def find(self, finding: Finding) -> None:
        """Writes down what the guard found."""
        self._findings.append([{"step": finding.step, "what": finding.what, "text": finding.text}])

    def finish_step(self, record: Mapping[str, float]) -> None:
        """Writes a step's metrics down, once its rollouts are: a step on record has them."""
        self.rollouts.settle()
        self.metrics.write(record)

    def close(self) -> None:
        """Closes all files, once what was handed over is written; raises what could not be."""
        try:
            self.rollouts.close()
        finally:
            self._close_ledgers()

    def _close_ledgers(self) -> None:
        self.metrics.close()
        for ledger in self._ledgers.values():
            ledger.close()


def _rollouts_of(kept: Mapping[str, Any] | None) -> Mapping[str, int] | None:
    """Where the rollouts of a checkpoint end, as `find_cut` is given it; older versions wrote one file of them."""
    if kept is None or "rollouts" in kept:
        return None if kept is None else kept["rollouts"]
    return {"segment": 0, "rows": kept["bytes"]["rollouts"]}


def _end(ledger: JsonlLedger, begin: int, step: int) -> int:
    """Where the rows of `step` end, which begin at `begin` where there are any."""
    end = begin
    for line in read_lines(ledger.path, begin):
        if step_of(line, CheckpointError) > step:
            break
        end = line.end
    return end


def _rows(
    ledger: JsonlLedger, begin: int, end: int, *, needs: Collection[str] = (), numbers: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows between two of its bytes; CheckpointError for one without what it `needs`, of that `numbers`."""
    for line in read_lines(ledger.path, begin) if begin < end else ():
        if line.end > end:
            break
        row = row_of(line, CheckpointError)
        require_names(row, needs, line, CheckpointError)
        require_numbers(row, line, CheckpointError, names=numbers)
        yield row
