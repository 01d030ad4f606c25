"""Which cases `make test` leaves to `make test-all`: the tables, and how they are applied.

They name test functions, so a file may move to another folder; where several files have a function of that name,
``file.py::name`` means one of them, and the name alone all. Every function keeps a quick case, unless one case alone
takes more than five seconds (of a CPU's time). A name that no test has, or has no longer, fails test_slow.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

# Every case is slow: it alone takes more than five seconds.
ALONE = {
    "test_two_processes_make_the_table_of_one": "three processes that load torch and a model",
    "test_processes_that_keep_nothing_on_disk_gather_all_answers": "two processes that load torch and a model",
    "test_accelerate_that_starts_one_process_for_two_is_refused": "accelerate starts a process",
    "test_a_bench_killed_at_20_random_moments_ends_with_the_same_table": "a bench is started and killed 20 times",
    "test_videos_are_benched_like_pictures": "a whole bench over clips",
    "test_rows_come_in_a_fixed_order_with_all_baselines": "a whole bench of every method",
    "test_the_trained_model_is_tuned_for_real": "a search with a trained model",
    "test_clips.py::test_the_model_sees": "a trained model answers hundreds of questions",
    "test_screens.py::test_the_model_sees": "a trained model answers hundreds of questions",
    "test_shapes_next_sees": "a trained model answers hundreds of questions",
    "test_starting_up_does_not_touch_the_network": "the app starts in a process of its own",
    "test_a_thousand_attachments_leave_nothing_behind": "1,000 attachments",
    "test_references_stay_within_300_mib_at_16384_tokens": "16,384 tokens on a CPU",
}

# The first case is quick; the others do the same again with other inputs, for seconds each.
FIRST = {
    "test_kernels_compile_without_spills_and_fit_a_multiprocessor": "a compilation of every kernel per architecture",
    "test_attached_models_compile_whole": "a compilation per model",
    "test_runs_as_a_module": "a process that loads torch per module",
    "test_nvidia_packages_import_beside_the_folder_named_cuda": "a process that loads torch per way to import",
    "test_data_loaders_work_beside_an_attached_model": "worker processes per way to start them",
}

# Crossings: quick are the first cases in which every value of every parameter occurs once.
CROSSED = {
    "test_a_cache_changes_no_token": "methods x families x positions x batch sizes",
    "test_entry_pruning_equals_masking": "families x attentions x scenes",
    "test_layer_pruning_equals_masking_from_that_layer_on": "families x attentions x scenes",
    "test_keeping_everything_and_detaching_are_bit_equal": "families x attentions x scenes",
    "test_batched_generation_equals_singles": "families x attentions x positions x budgets",
    "test_padded_equals_the_unpruned_model_with_markers_in_it": "families x scenes x markers",
    "test_half_precision_stays_what_it_is": "families x types",
}

# Every test that uses the fixture is slow.
FIXTURES = {"browser": "starts chromium"}


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Put the marker ``slow`` on the cases that the tables above say."""

    def function(item: pytest.Item) -> tuple[Path, str]:
        return item.path, getattr(item, "originalname", None) or item.name

    for (path, name), cases in itertools.groupby(sorted(items, key=function), key=function):
        for case in _slow({name, f"{path.name}::{name}"}, list(cases)):
            case.add_marker(pytest.mark.slow)


def _slow(names: set[str], cases: list[pytest.Item]) -> list[pytest.Item]:
    """Those of one test's cases, in the order of collection, that are slow."""
    if names & ALONE.keys() or FIXTURES.keys() & set(getattr(cases[0], "fixturenames", ())):
        return cases
    if names & FIRST.keys():
        return cases[1:]
    slow, seen = [], set()
    for case in cases if names & CROSSED.keys() else ():
        values = {(parameter, repr(value)) for parameter, value in case.callspec.params.items()}
        if values <= seen:
            slow.append(case)
        seen |= values
    return slow
