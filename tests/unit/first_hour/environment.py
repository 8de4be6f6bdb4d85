"""The environment of a process: variables that are not set, empty or wrong, folders that are gone, terminals of all kinds."""

from __future__ import annotations

from tests.unit.first_hour.case import Case, accepted, refused, shell

CHECK = "check run.toml"
OWN = "check run.toml data.reward=rewards.py:right"  # which starts a process
CASES: list[Case] = [
    accepted("no home folder", CHECK, HOME=None),
    accepted("a home folder that is gone", CHECK, HOME="/gone"),
    accepted("a home folder that cannot be written", CHECK, HOME="/proc"),
    accepted("caches that cannot be written", CHECK, HF_HOME="/proc/hf", XDG_CACHE_HOME="/proc/cache"),
    accepted("no PATH", OWN, PATH=None),
    accepted("an empty PATH", OWN, PATH=""),
    accepted("a folder for temporary files that is gone", OWN, TMPDIR="/gone"),
    accepted("a terminal of one column", CHECK, COLUMNS="1"),
    accepted("a terminal of no columns", CHECK, COLUMNS="0"),
    accepted("columns that are no number", CHECK, COLUMNS="wide"),
    accepted("a terminal of ten thousand columns", CHECK, COLUMNS="10000"),
    accepted("a dumb terminal", CHECK, TERM="dumb"),
    accepted("a terminal that nobody knows", CHECK, TERM="gone"),
    accepted("no terminal", CHECK, TERM=None),
    accepted("no colours", CHECK, NO_COLOR="1"),
    accepted("colours whatever there is", CHECK, FORCE_COLOR="1"),
    accepted("threads that are no number", CHECK, OMP_NUM_THREADS="many"),
    accepted("GPUs that are not there", CHECK, CUDA_VISIBLE_DEVICES="9"),
    accepted("no GPUs", CHECK, CUDA_VISIBLE_DEVICES=""),
    accepted("a Ray elsewhere", CHECK, RAY_ADDRESS="ray://gone:10001"),
    accepted("a proxy", CHECK, HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9"),
    accepted("a hub that may be asked, for a model that is here", CHECK, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"),
    refused(
        "a mistake on a terminal of one column",
        CHECK + " run.steps=0",
        2,
        "run.steps: input should be greater than 0",
        COLUMNS="1",
    ),
    refused("a mistake with colours", CHECK + " run.steps=0", 2, "run.steps: input should be greater than 0", FORCE_COLOR="1"),
    accepted("doctor without a home folder and a PATH", "doctor", "python", HOME=None, PATH="/usr/bin"),
    accepted("doctor on a dumb terminal of one column", "doctor", "o", TERM="dumb", COLUMNS="1"),
    shell(
        "the alphabet of C", "LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 semion check 'ü.toml'", 2, "No such file", sentences=1
    ),
    shell("an output that knows ASCII alone", "PYTHONIOENCODING=ascii semion check run.toml", 0, "as resolved"),
    shell(
        "a working directory that is gone",
        "mkdir gone; cd gone; rmdir ../gone; semion check run.toml",
        2,
        "the working directory must be there",
        sentences=1,
    ),
    shell("a limit on files", "ulimit -f 1; semion check run.toml --json spec.json", 4, "may not be so large", sentences=1),
]
