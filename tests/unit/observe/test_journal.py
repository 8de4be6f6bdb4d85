"""What processes log and warn of: written before a process can die, collected once, counted, and told to people."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.api.events import typed
from engine.commands.training import show
from engine.observe.journal import SUFFIX, Journal, Warnings, read_warnings, sentence
from engine.observe.summary import summarize
from tests import builders

# A process of a run: opens its journal, and then does as told.
PROCESS = """
import ctypes, logging, os, signal, sys
from pathlib import Path
from typing import Any
from engine.observe.journal import Journal, traced
Journal(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "verbose").open()
log = logging.getLogger("engine.bridge.setup")
"""


def process(folder: Path, name: str, does: str, verbose: str = "quiet") -> subprocess.CompletedProcess[str]:
    code = PROCESS + does
    return subprocess.run([sys.executable, "-c", code, str(folder), name, verbose], capture_output=True, text=True, timeout=60)


def told(warnings: Warnings) -> list[tuple[str, str, int]]:
    return [(event["where"], event["text"], event["count"]) for event in warnings.fresh()]


def test_a_warning_of_a_process_that_is_killed_right_after_reaches_the_command(tmp_path):
    warnings = Warnings(tmp_path / "logs", tmp_path / "warnings.jsonl")
    assert warnings.fresh() == []
    does = "log.warning('over %s\\nnow', 'gloo'); os.kill(os.getpid(), signal.SIGKILL)"
    done = process(tmp_path / "logs", "trainer rank 1", does)
    assert (done.returncode, done.stdout, done.stderr) == (-9, "", "")
    assert told(warnings) == [("trainer rank 1", "over gloo now", 1)]
    assert warnings.fresh() == []
    (row,) = read_warnings(tmp_path / "warnings.jsonl")
    assert (row["process"], row["text"], row["count"]) == ("trainer rank 1", "over gloo now", 1) and row["unix_seconds"] > 1e9
    assert "WARNING engine.bridge.setup: over gloo" in (tmp_path / "logs" / "trainer_rank_1.log").read_text()


def test_the_log_has_information_tracebacks_and_what_libraries_print_down_to_their_last_words(tmp_path):
    does = """
import faulthandler
log.info("of interest")
log.debug("of none")
print("a library prints", flush=True)
os.write(2, b"and one writes below Python\\n")
try:
    with traced("train"):
        {}["lr"]
except KeyError:
    faulthandler.enable()
    ctypes.string_at(0)
"""
    done = process(tmp_path, "the reward engine", does)
    assert (done.returncode, done.stdout, done.stderr) == (-11, "", "")
    log = (tmp_path / "reward_engine.log").read_text()
    wanted = ("the reward engine: process", "of interest", "a library prints", "below Python", "train raised", "KeyError: 'lr'")
    assert [words for words in (*wanted, "Segmentation fault") if words not in log] == []
    assert "of none" not in log
    assert Warnings(tmp_path, None).fresh() == [], "a traceback is no warning"


def test_a_verbose_process_keeps_its_output_and_shows_what_it_logs(tmp_path):
    done = process(tmp_path, "engine 0", "print('of a library'); log.warning('of ours')", "verbose")
    assert "of a library" in done.stdout and "of ours" in done.stderr
    assert "of a library" not in (log := (tmp_path / "engine_0.log").read_text()) and "of ours" in log
    assert told(Warnings(tmp_path, None)) == [("engine 0", "of ours", 1)]


def test_equal_warnings_are_counted_and_told_ever_more_rarely(tmp_path):
    logs, ledger = tmp_path / "logs", tmp_path / "warnings.jsonl"
    warnings = Warnings(logs, ledger)
    process(logs, "trainer rank 0", "for i in range(250): log.warning('again'); i or log.warning('once')")
    assert len((logs / f"trainer_rank_0{SUFFIX}").read_text().splitlines()) == 4
    wanted = [("again", 1), ("once", 1), ("again", 10), ("again", 100)]
    assert told(warnings) == [("trainer rank 0", text, count) for text, count in wanted]
    process(logs, "trainer rank 0", "log.warning('again')")  # started anew
    assert told(warnings) == []
    assert warnings.close() == []
    assert [(row["text"], row["count"]) for row in read_warnings(ledger)] == [("again", 101), ("once", 1)]
    assert not list(logs.glob(f"*{SUFFIX}"))
    later = Warnings(logs, ledger)
    process(logs, "trainer rank 0", "log.warning('again'); log.warning('once')")
    assert told(later) == [], "the count goes on in the next attempt"


def test_what_a_killed_command_did_not_collect_the_next_one_does_once(tmp_path):
    logs, ledger = tmp_path / "logs", tmp_path / "warnings.jsonl"
    lost = Warnings(logs, ledger)
    process(logs, "engine 1", "log.warning('told')")
    assert told(lost) == [("engine 1", "told", 1)]
    process(logs, "engine 1", "log.warning('left')")
    following = Warnings(logs, ledger)
    assert told(following) == [("engine 1", "left", 1)]
    following.close()
    assert [row["text"] for row in read_warnings(ledger)] == ["told", "left"]


def test_people_see_a_warning_in_the_progress_and_in_the_summary(tmp_path, capsys):
    config = builders.config(tmp_path, run={"steps": 2})
    row = {"unix_seconds": 1.0, "process": "trainer rank 0", "text": "over gloo", "count": 10}
    (tmp_path / "warnings.jsonl").write_text(json.dumps(row) + "\n")
    event: dict[str, Any] = {"kind": "warning", "where": "trainer rank 0", "text": "over gloo", "count": 10}
    assert sentence(event) == "warning, trainer rank 0: over gloo (10 times so far)"
    assert sentence(event | {"count": 1}) == "warning, trainer rank 0: over gloo"
    show(config, "train", [typed(event), typed({"kind": "done", "engine_versions": {}})])
    assert summarize(tmp_path)["warnings"] == [row]
    assert "warning, trainer rank 0: over gloo (10 times so far)\n" in capsys.readouterr().out


def test_a_log_is_called_as_errors_call_its_process(tmp_path):
    names = {"trainer rank 12": "trainer_rank_12.log", "the reward engine": "reward_engine.log", "engine 0": "engine_0.log"}
    assert {name: Journal(tmp_path, name, False).log.name for name in names} == names
