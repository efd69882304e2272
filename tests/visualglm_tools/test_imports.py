"""Garbage is looked for again as soon as libraries are imported, or could not be."""

import gc
import sys
from contextlib import nullcontext

import pytest

from visualglm_tools.imports import heavy_imports


@pytest.fixture
def collector(monkeypatch):
    """What became of the collector; it is afterwards as it was."""
    calls, was_on = [], gc.isenabled()
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    gc.enable()
    yield calls
    (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("error", [None, ImportError, KeyboardInterrupt, SystemExit])
def test_the_collector_is_off_while_libraries_are_imported_and_on_again_whatever_happens(error, collector, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(error) if error else nullcontext(), heavy_imports():
        assert not gc.isenabled()
        if error:
            raise error
    assert gc.isenabled()
    assert collector == ([] if error else [False])  # what was imported is not looked through again


def test_the_collector_stays_as_it_is_where_libraries_are_there_already_or_it_was_off(collector, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    with heavy_imports():
        assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    with heavy_imports():
        pass
    assert not gc.isenabled() and collector == []
