"""No garbage is collected while modules are imported, and as before afterwards."""

import gc

import pytest

from engine.core.importing import uncollected


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_meanwhile_and_what_is_there_is_left_alone_after():
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > frozen


def test_a_collector_that_was_off_stays_off_and_errors_change_nothing():
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()
