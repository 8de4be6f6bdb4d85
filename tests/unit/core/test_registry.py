"""Users' files in different folders that import different modules of one name."""

import sys

import pytest

from engine.core.errors import ConfigError
from engine.core.registry import load_object


@pytest.fixture(autouse=True)
def _imports_as_before(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        del sys.modules[name]


def folder(tmp_path, name: str, body: str = "import semion_test_helper\ndef f():\n    return semion_test_helper.NAME\n") -> str:
    place = tmp_path / name
    place.mkdir()
    (place / "semion_test_helper.py").write_text(f"import semion_test_deeper\nNAME = {name!r} + semion_test_deeper.NAME\n")
    (place / "semion_test_deeper.py").write_text(f"NAME = {name!r}\n")
    (place / "own.py").write_text(body)
    return f"{place}/own.py:f"


def test_each_file_has_the_modules_beside_it(tmp_path):
    first, second = (load_object(folder(tmp_path, name), "data.reward") for name in ("a", "b"))
    assert (first(), second(), first()) == ("aa", "bb", "aa")
    assert sys.modules["semion_test_helper"].NAME == "aa", "the first file may import it again"


def test_an_import_inside_a_function_that_would_find_the_other_ones_is_refused(tmp_path):
    load_object(folder(tmp_path, "a"), "data.reward")
    inside = "def f():\n    from semion_test_helper import NAME\n    return NAME\n"
    with pytest.raises(ConfigError, match=r"own\.py, line 2: semion_test_helper must be imported at the top .*/a; found"):
        load_object(folder(tmp_path, "b", inside), "data.reward")
    assert load_object(folder(tmp_path, "c", "import json\ndef f():\n    import math\n    return 1\n"), "data.reward")() == 1
