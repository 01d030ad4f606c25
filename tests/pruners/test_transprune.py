"""TransPrune's schedule, score and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.errors import BudgetError, ParameterError
from foveate.pruners import HiPrune, Layout, ModelInfo, Then, TransPrune, VisionZip
from foveate.pruners.core.signals import InstructionAttention, TransitionVariation
from foveate.pruners.transprune import combined_score
from tests.pruners.synthetic import CLIP, make_tokens

BAD = [
    ({"ratios": (0.5, 0.0), "prune_layers": (1, 2)}, BudgetError, "keeps nothing"),
    ({"ratios": (1.5,), "prune_layers": (1,)}, BudgetError, r"\(0, 1\]"),
    ({"ratios": (0.2, 0.5), "prune_layers": (1, 2)}, ParameterError, "at most the one before"),
    ({"ratios": (0.5,)}, ParameterError, "one ratio per layer"),
    ({"ratios": 0.5}, ParameterError, "sequence of numbers"),
    ({"prune_layers": (9, 7, 12)}, ParameterError, "must rise"),
    ({"alpha": 1.5}, ParameterError, "alpha=1.5"),
    ({"direction": "up"}, ParameterError, "'up'"),
    ({"softmax_scope": "batch"}, ParameterError, "'batch'"),
]


@pytest.mark.parametrize(("values", "error", "says"), BAD)
def test_bad_parameters_are_refused(values: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        TransPrune(**values)


@pytest.mark.parametrize("layer", [0, 32, 40])
def test_layers_outside_the_model_are_refused(layer: int) -> None:
    """Statement: neither the entry nor the end of the decoder is a place to prune; the message says which are."""
    with pytest.raises(ParameterError, match=rf"prune_layers={layer}.*1 \.\. 31"):
        TransPrune(ratios=(0.5,), prune_layers=(layer,)).stages(CLIP)
    with pytest.raises(ParameterError, match="accumulate_layers=33"):
        TransPrune(accumulate_layers=(33,)).stages(CLIP)


def test_the_published_schedule() -> None:
    """Statement: on 32 layers the defaults act in front of 0-based layers 7, 9, 12 and read transitions of 6 .. 11 so
    far.
    """
    stages = TransPrune().stages(CLIP)
    assert [stage.layer for stage in stages] == [7, 9, 12]
    read = [[s.layer for s in stage.signals.values() if isinstance(s, TransitionVariation)] for stage in stages]
    assert read == [[6], [6, 7, 8], [6, 7, 8, 9, 10, 11]]
    ahead = [[s.layer for s in stage.signals.values() if isinstance(s, InstructionAttention)] for stage in stages]
    assert ahead == [[7], [9], [12]]
    assert [TransPrune().count(Layout.grid(1, n)) for n in (576, 2880)] == [72, 360]


@pytest.mark.parametrize("depth", [2, 4, 8, 28, 40])
def test_other_depths_are_scaled(depth: int) -> None:
    """Statement: the scaled schedule fits the decoder, ends with the last ratio, and keeps about 41 % on average if it
    can.
    """
    schedule = TransPrune().schedule(ModelInfo(decoder_layers=depth))
    assert list(schedule) == sorted(schedule)
    assert 1 <= min(schedule) <= max(schedule) < depth
    assert list(schedule.values())[-1] == 0.125
    if depth >= 8:
        mean = sum(max((r for p, r in schedule.items() if p <= i), key=lambda r: -r, default=1.0) for i in range(depth))
        assert mean / depth == pytest.approx(0.41, abs=0.03)


def test_counts_follow_the_float_product() -> None:
    """Statement: 90 tokens at 0.7 leave 62, as the published code counts."""
    assert TransPrune(ratios=(0.7,), prune_layers=(3,)).count(Layout.grid(1, 90)) == 62
    assert int(90 * 0.7) == 62


def test_small_pictures_may_lose_everything_and_full_stages_nothing() -> None:
    (stage,) = TransPrune(ratios=(0.125,), prune_layers=(3,)).stages(CLIP)
    tokens = make_tokens(Layout.grid(1, 3), 2, 0)
    zeros = {name: torch.zeros(2, 3) for name in stage.signals}
    assert stage.select(tokens, **zeros).index.shape == (2, 0)
    tokens.entered = 30  # three of thirty are left, as many as the stage wants
    assert stage.select(tokens, **zeros).index.tolist() == [[0, 1, 2]] * 2


def test_scores_are_normalised_before_they_are_added() -> None:
    """Statement: transitions and attention weigh alike whatever their scale; without transitions attention decides
    alone.
    """
    attention, moves = torch.tensor([[1.0, 3.0]]), torch.tensor([[30.0, 10.0]])
    torch.testing.assert_close(combined_score((moves, moves), attention), torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(combined_score((), attention), torch.tensor([[0.25, 0.75]]))
    assert combined_score((moves,), attention, alpha=0.9)[0].argmax() == 0
    assert combined_score((moves,), torch.zeros(1, 2)).isfinite().all()


def test_composition_counts_what_entered() -> None:
    """Statement: behind another method the ratios count the tokens that it left: 192 -> 24 and 288 -> 36."""
    assert Then(VisionZip(keep=192), TransPrune.combined()).count(Layout.grid(24, 24)) == 24
    assert Then(HiPrune(keep=288), TransPrune.combined()).count(Layout.grid(24, 24)) == 36
    assert TransPrune.high() == TransPrune()
    assert replace(TransPrune.combined(), ratios=TransPrune().ratios) == TransPrune()
