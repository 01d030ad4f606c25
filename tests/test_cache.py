"""Statement: with the KV cache every method answers token for token as without it, for every family, both position
policies, alone and in a padded batch.

Without a cache a prompt is chosen from anew at every step, and methods that read the text choose otherwise once it has
grown. So what was chosen with the cache is kept, and chosen again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate.adapters import adapter_for
from foveate.errors import UnsupportedModelError
from foveate.pruners import PRUNERS
from foveate.pruners.core import AtEntry, BeforeLayer, ModelInfo, Pruner, Selection, Stage, Tokens, create
from tests.models import FAMILIES, inputs, picture, tiny

STEPS = 8
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
# what fits four decoder layers and 12 to 52 tokens; CoreMatching as far as it holds without a cache as well: one that
# is emptied afterwards, and neurons that rest while the answer is written, are compared with masking in test_oracles.py
PARAMETERS: dict[str, dict[str, Any]] = {
    "corematching": {"budget": 0.4, "select_layer": 1, "neuron_layers": (), "kv_evict": False},
    "fastv": {"k": 2, "keep": 0.4},
    "pitome": {"ratio": 0.8},
    "tome": {"r": 2},
    "todre": {"keep": 0.4, "check_depth": (0.5,), "tau": 1.0},
    "transprune": {"ratios": (0.7, 0.4), "prune_layers": (1, 2), "accumulate_layers": (1, 2)},
}
# what families lack: a tower that can be merged in, a picture whose tokens follow its size
REFUSED = {
    *((method, family) for method in ("pitome", "tome") for family in FAMILIES if "qwen" in family),
    *(("downsample", family) for family in ("llava_next", "llava_onevision")),
}
# where it is the picture that is made smaller, before the processor, and nothing happens in the model
OUTSIDE = {("downsample", family) for family in FAMILIES if "qwen" in family}
CASES = [
    pytest.param(method, family, id=f"{method}-{family}")
    for method in sorted(PRUNERS)
    for family in FAMILIES
    if (method, family) not in REFUSED | OUTSIDE
]


@dataclass(frozen=True)
class Rehearsed(Pruner):
    """A method that, asked again about the same pictures at the same place, chooses what it chose first."""

    inner: Pruner
    chosen: dict[Any, Selection] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return self.inner.name

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        return tuple(self._again(stage) for stage in self.inner.stages(model))

    def _again(self, stage: Stage) -> Stage:
        if not isinstance(stage, (AtEntry, BeforeLayer)):
            return stage  # before the decoder nobody sees the text

        def select(tokens: Tokens, **signals: Tensor) -> Selection:
            key = (
                stage.point,
                stage.layer,
                tokens.layout,
                tokens.embeds.shape[:2],
            )  # pictures of one layout come together
            if key not in self.chosen:
                self.chosen[key] = stage.select(tokens, **signals)
            return self.chosen[key]

        return replace(stage, select=select)


@functools.cache
def model_of(family: str) -> nn.Module:
    return tiny(family)


def prompt(family: str, batch: int) -> dict[str, Tensor]:
    """One picture, or two samples of different length, with pictures of different shapes where the family has them."""
    other = {"llava": None, "llava_next": (30, 60), "llava_onevision": (30, 60)}.get(family, (3, 5))
    return inputs(family, [[3, picture(family, 1), 8], [6, picture(family, 2, other), 12]][:batch])


def method(name: str) -> Pruner:
    default = {"keep": 0.4} if hasattr(PRUNERS[name], "keep") else {}
    return create(name, **PARAMETERS.get(name, default))


def answers(model: nn.Module, given: dict[str, Tensor], pruner: Pruner, positions: str) -> tuple[Tensor, Tensor, int]:
    """Tokens ``(B, STEPS)`` with and without a cache, and how many places the last layer lost."""
    found = []
    with foveate.attach(model, pruner, positions=positions) as session, torch.no_grad():
        for cached in (True, False):
            session.sample_ids = range(len(given["input_ids"]))
            found.append(model.generate(**given, use_cache=cached, **GREEDY)[:, -STEPS:])
        lost = sum(image.layout.length - image.tokens_per_layer[-1] for image in session.trace.images)
    return *found, lost


@pytest.mark.filterwarnings("ignore:.*(focusui|pospad).*")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_cache_changes_no_token(name: str, family: str, positions: str, batch: int) -> None:
    model, given = model_of(family), prompt(family, batch)
    with_cache, without, lost = answers(model, given, Rehearsed(method(name)), positions)
    assert lost > 0, "the case prunes nothing"
    assert torch.equal(with_cache, without)


def test_what_is_left_out_above_is_refused_or_does_nothing() -> None:
    for name, family in sorted(REFUSED):
        with pytest.raises(UnsupportedModelError):
            foveate.attach(model_of(family), method(name))
    for name, family in sorted(OUTSIDE):
        assert method(name).stages(adapter_for(model_of(family)).info) == ()
