"""The control keeps as many tokens as its method, where the method does, and chooses by chance."""

from __future__ import annotations

import torch

import foveate
from foveate.eval_suites.running.runner import parse_methods, plan
from foveate.pruners.core.control import RandomLike
from tests.models import inputs, picture, tiny


@torch.no_grad()
def test_the_control_has_its_methods_counts_and_other_tokens() -> None:
    """Statement: equal numbers in every layer and cache, sample by sample, also where the content decides; another
    seed, another choice.
    """
    model = tiny("llava")
    given = inputs("llava", [[2, picture("llava", 1), 4], [5, picture("llava", 2), 9]])
    for method in (
        foveate.TransPrune(ratios=(0.8, 0.4), prune_layers=(1, 3), accumulate_layers=(1, 2)),
        foveate.CoreMatching(neuron_layers=(0,)),
    ):
        traces = []
        for pruner in (method, RandomLike(method), RandomLike(method), RandomLike(method, seed=1)):
            with foveate.attach(model, pruner) as session:
                model(**given, use_cache=True)
                traces.append(session.trace)
        for images in zip(*(trace.images for trace in traces)):
            assert all(image.tokens_per_layer == images[0].tokens_per_layer for image in images)
            assert all(image.cached_per_layer == images[0].cached_per_layer for image in images)
        kept = [[image.kept.tolist() for image in trace.images] for trace in traces]
        assert kept[1] == kept[2]
        assert kept[0] != kept[1] != kept[3]


def test_the_control_has_a_name() -> None:
    """Statement: random@METHOD makes it wherever methods are named, with the method's parameters, composed ones too."""
    assert foveate.pruners.create("random@fastv", keep=7) == RandomLike(foveate.FastV(keep=7))
    assert foveate.pruners.create("random@pospad:hiprune", keep=7) == RandomLike(
        foveate.PosPad(inner=foveate.HiPrune(keep=7))
    )


def test_the_bench_draws_the_control_at_every_budget() -> None:
    """Statement: random@METHOD has the budgets of the method, its own row where the method finds its own, and every
    seed.
    """
    runs = [run for run in plan("random@transprune,random@corematching(beta=0.5)", [0.5, 4], 2) if "@" in run.label]
    assert all(run.baseline for run in runs)
    label = "random@corematching(beta=0.5)"
    assert [(run.label, run.keep, run.seed) for run in runs] == [
        *((label, keep, seed) for keep in (0.5, 4) for seed in (0, 1)),
        *(("random@transprune", None, seed) for seed in (0, 1)),
        *((label, None, seed) for seed in (0, 1)),
    ]


def test_names_carry_tuples_beside_other_parameters() -> None:
    assert parse_methods("transprune(ratios=(0.5, 0.25), alpha=0.5),random@corematching(neuron_layers=())") == [
        ("transprune", {"ratios": (0.5, 0.25), "alpha": 0.5}),
        ("random@corematching", {"neuron_layers": ()}),
    ]
