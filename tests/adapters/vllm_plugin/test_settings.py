"""What a `foveate` entry may say; no vLLM needed."""

from __future__ import annotations

import pytest

from foveate.adapters.vllm_plugin.settings import identity, merged, parse
from foveate.errors import FoveateError, ParameterError, UnknownNameError
from foveate.pruners.hiprune import HiPrune

ENGINE = {"pruner": "hiprune", "keep": 0.25, "alpha": 0.2}


def test_engine_entry_becomes_a_method():
    assert parse(merged(ENGINE)).pruner == HiPrune(keep=0.25, alpha=0.2)


def test_request_changes_only_what_it_names():
    assert parse(merged(ENGINE, {"keep": 0.5})).pruner == HiPrune(keep=0.5, alpha=0.2)


def test_another_method_starts_from_its_own_defaults():
    assert merged(ENGINE, {"pruner": "divprune"}) == {"pruner": "divprune"}


@pytest.mark.parametrize(("engine", "request_"), [(ENGINE, False), ({}, None)])
def test_no_pruning(engine, request_):
    assert merged(engine, request_) is None


@pytest.mark.parametrize("given", [5, "hiprune", ["hiprune"], {"keep": 0.5}])
def test_unusable_entries_are_told_apart_from_an_armed_engine(given):
    with pytest.raises(ParameterError, match="foveate"):
        merged({}, given)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"pruner": "hipruen"}, "did you mean 'hiprune'"),
        ({"pruner": "hiprune", "keep": 0}, "keep=0"),
        ({"pruner": "hiprune", "keep": 1.5}, "1.5"),
        ({"pruner": "hiprune", "keep": "a"}, "'a'"),
        ({"pruner": "hiprune", "kep": 3}, "did you mean 'keep'"),
        ({"pruner": 3}, "pruner=3"),
        ({"pruner": "random", "separators": "some"}, "separators='some'"),
        ({"pruner": "random", "keep": {1, 2}}, "JSON"),
    ],
)
def test_bad_values_say_what_was_wrong(entry, says):
    with pytest.raises(FoveateError, match=says):
        parse(entry)


def test_unknown_methods_are_unknown_names():
    with pytest.raises(UnknownNameError):
        parse({"pruner": "nope"})


def test_caches_tell_apart_methods_parameters_and_versions():
    entries = [None, ENGINE, {**ENGINE, "keep": 0.5}, {**ENGINE, "separators": "keep"}, {"pruner": "random"}]
    marks = {identity(entry, version) for entry in entries for version in ("1", "2")}
    assert len(marks) == 2 * len(entries)


def test_a_default_written_out_shares_its_cache():
    assert identity({"pruner": "random"}, "1") == identity({"keep": 0.25, "pruner": "random"}, "1")
