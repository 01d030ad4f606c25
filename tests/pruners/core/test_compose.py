"""Then: several methods in sequence."""

from __future__ import annotations

import pytest

from foveate.errors import ParameterError
from foveate.pruners import AtEntry, BeforeLayer, DivPrune, Downsample, FastV, FoPru, Layout, ModelInfo, Then, ToDRE
from tests.pruners.synthetic import CLIP


def test_stages_follow_each_other() -> None:
    """Statement: the stages are those of the parts, in order."""
    both = Then(DivPrune(keep=0.5), FastV(k=3), ToDRE(stage1=False))
    assert [(type(s), s.layer) for s in both.stages(CLIP)] == [
        (AtEntry, 0),
        (BeforeLayer, 3),
        (BeforeLayer, 28),
    ]


def test_fractions_count_what_is_left() -> None:
    """Statement: half of half is a quarter, for counts and layouts."""
    both = Then(DivPrune(keep=0.5), FastV(keep=0.5))
    assert both.count(Layout.grid(8, 8)) == 16
    assert both.count(Layout.grid(4, 4)) == 4


def test_properties_come_from_the_parts() -> None:
    """Statement: counts, also where the content or the grid decides, parameters and picture preparation are those of
    the parts.
    """
    picture = Layout.grid(4, 6)
    assert Then(ToDRE(keep=8, stage2=False), FastV()).count(picture) == 4
    assert Then(DivPrune(), ToDRE(stage1=False)).count(picture) is None
    assert Then(ToDRE(), FastV()).count(picture) is None
    assert Then(FoPru(strategy="row"), FastV()).count(picture) == 3  # one of four rows, of six tokens
    assert Then(FoPru(strategy="row"), FastV()).count(Layout.grid(6, 4)) == 2
    assert Then(DivPrune(keep=7), FastV()).parameters()["pruners"][0] == ("divprune", {"keep": 7})
    assert Then(Downsample(), FastV()).stages(ModelInfo(family="qwen2_vl"))[0].layer == 2


def test_two_methods_at_the_entry_are_refused() -> None:
    """Statement: a second method at the decoder's entry is refused, naming both."""
    with pytest.raises(ParameterError, match=r"divprune and fopru.*fastv"):
        Then(DivPrune(), FoPru()).stages(CLIP)


def test_the_order_of_the_model_is_kept() -> None:
    """Statement: a method that acts earlier than the one before it is refused, at equal layers too."""
    with pytest.raises(ParameterError, match=r"llm_layer\(2\), not after todre at llm_layer\(28\)"):
        Then(ToDRE(), FastV()).stages(CLIP)
    with pytest.raises(ParameterError, match="change their order"):
        Then(FastV(), FastV()).stages(CLIP)
    with pytest.raises(ParameterError, match="llm_input"):
        Then(FastV(), DivPrune()).stages(CLIP)


@pytest.mark.parametrize("parts", [(), ("fastv",), (DivPrune,)])
def test_parts_must_be_configured(parts: tuple[object, ...]) -> None:
    """Statement: names and classes are not methods yet."""
    with pytest.raises(ParameterError, match="configured methods"):
        Then(*parts)
