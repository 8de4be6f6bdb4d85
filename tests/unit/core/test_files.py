"""A file that is replaced: its reader finds the old one or the new, whatever happens to the writer. What cannot be written is
one sentence, and leaves nothing behind.
"""

import errno
import os
import resource
import threading
from contextlib import contextmanager

import pytest
from safetensors import SafetensorError

from engine.core.errors import ConfigError, StorageError
from engine.core.files import atomic_write, locked, staged_folder, storing, unwritable, writing
from engine.core.jsonl import JsonlLedger


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


@contextmanager
def files_of_at_most(num_bytes):
    """While no file of this process can be longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    with files_of_at_most(1000):
        with pytest.raises(StorageError, match="may not be so large") as one, atomic_write(tmp_path / "a" / "file") as part:
            part.write_bytes(bytes(2000))
        with pytest.raises(StorageError), staged_folder(tmp_path / "b" / "model") as staging:
            (staging / "weights").write_bytes(bytes(2000))
        ledger = JsonlLedger(tmp_path / "c" / "metrics.jsonl")
        with pytest.raises(StorageError, match=r"2,0\d\d bytes needed"):
            ledger.append([{"step": 0, "text": "x" * 2000}])
    assert str(tmp_path / "a") in str(one.value) and "free at" in str(one.value)
    assert (one.value.exit_code, one.value.may_pass) == (4, False)
    assert [list((tmp_path / name).iterdir()) for name in "ab"] == [[], []]
    with pytest.raises(ValueError, match="of the block"), atomic_write(tmp_path / "file") as part:
        raise ValueError("an error of the block is its own")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_both_ways_to_tell_that_a_disk_is_full(tmp_path, code):
    errors = OSError(code, os.strerror(code)), SafetensorError(f"Error while serializing: I/O error: (os error {code})")
    for error in errors:
        assert unwritable(error) == code
        with pytest.raises(StorageError, match="12 bytes needed and"), storing(tmp_path / "new", lambda: 12):
            raise error
    assert unwritable(OSError(errno.ENOENT, "")) is None and unwritable(ValueError("os error 28")) is None


def test_records_are_written_by_one_process_at_a_time(tmp_path):
    """One that outlives its killed command keeps them from the next one until it ends, and no longer than that is waited."""
    with locked(tmp_path), writing(tmp_path):
        with (
            pytest.raises(ConfigError, match=r"run\.directory must be written by one run at a time"),
            writing(tmp_path, patience_seconds=0.1),
        ):
            pass
        order: list[str] = []
        met = threading.Event()

        def waits() -> None:
            order.append("waits")
            met.set()

        def resume() -> None:
            with writing(tmp_path, waits=waits):
                order.append("writes")

        resumed = threading.Thread(target=resume)
        resumed.start()
        assert met.wait(30)
        order.append("ends")
    resumed.join(30)
    assert order == ["waits", "ends", "writes"]
    with writing(tmp_path, waits=lambda: order.append("waits")):
        assert order[-1] == "writes", "nobody waits for what has ended"
