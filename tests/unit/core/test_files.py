"""A file that is replaced: its reader finds the old one or the new, whatever happens to the writer."""

import pytest

from engine.core.files import atomic_write


@pytest.mark.parametrize("durable", [False, True])
def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path, durable):
    path = tmp_path / "deep" / "LATEST"
    with atomic_write(path, durable=durable) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(TypeError), atomic_write(path, durable=durable) as part, part.open("w") as file:
        file.writelines(["half of t", 2])  # type: ignore[list-item]
    assert path.read_text() == "one"
    with atomic_write(path, durable=durable) as part:
        assert not part.exists(), "what an attempt left is no part of the next"
        part.write_text("two")
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == ["LATEST"]
