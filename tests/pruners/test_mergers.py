"""What every merger inside a vision tower must satisfy, block by block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.cuda import similarity_energy
from foveate.errors import FoveateError, ParameterError, UnsupportedModelError
from foveate.pruners import InTower, PiToMe, ToMe
from foveate.pruners.core import Layout, ModelInfo, View
from foveate.pruners.core.matching import energy_matching, protected_matching
from foveate.pruners.core.merging import BlockTokens, Groups, Merger, owners
from foveate.pruners.core.selection import ranked
from foveate.pruners.tome import schedule

MERGERS: list[Merger] = [
    ToMe(r=4),
    ToMe(ratio=0.8),
    ToMe(r=5, order="official"),
    ToMe(r=4, matching="random"),
    ToMe(r=4, matching="pairs"),
    ToMe(matching="kth", k=3),
    PiToMe(ratio=0.8),
    PiToMe(ratio=0.8, order="mae"),
    PiToMe(ratio=0.8, order="plain", energy="paper", alpha=0.5),
    PiToMe(ratio=0.8, order="llava"),
    PiToMe(ratio=0.3, centered=True, metric="tokens"),
]


def tower(prefix: int, depth: int = 4) -> ModelInfo:
    return ModelInfo(encoder_layers=depth, feature_layer=depth - 1, prefix_tokens=prefix, class_token=prefix > 0)


def drawn(batch: int, n: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


def groups_of(stage: InTower, x: Tensor, prefix: int) -> Groups:
    signals = {name: x.float() for name in stage.signals}
    return stage.select(BlockTokens(x, prefix, stage.removes(x.shape[1])), **signals)


@pytest.mark.parametrize("merger", MERGERS, ids=str)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), prefix=st.integers(0, 5), batch=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_groups_are_a_partition_of_the_announced_size(
    merger: Merger, n: int, prefix: int, batch: int, seed: int
) -> None:
    """Statement: in every block ``removes(n)`` rows merge into others, every row is in one group, the prefix stays in
    front.
    """
    x = drawn(batch, prefix + n, seed)
    for stage in merger.stages(tower(prefix)):
        count = stage.removes(prefix + n)
        assert 0 <= count <= max(n // 2, n // 3 * 2)
        if not count:
            continue
        groups = groups_of(stage, x, prefix)
        assert groups.keep.shape == (batch, prefix + n - count)
        assert groups.source.shape == groups.target.shape == (batch, count)
        rows = torch.cat([groups.keep, groups.source], dim=1).sort(dim=1).values
        assert torch.equal(rows, torch.arange(prefix + n).expand(batch, -1)), "each row once"
        assert torch.equal(groups.keep[:, :prefix], torch.arange(prefix).expand(batch, -1))
        assert (groups.target >= prefix).all(), "nothing merges into the prefix"
        assert (groups.target < groups.keep.shape[1]).all()
        owner = owners(groups)
        assert torch.equal(owner.gather(1, groups.keep), torch.arange(groups.keep.shape[1]).expand(batch, -1))


@pytest.mark.parametrize("merger", MERGERS, ids=str)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(12, 40), prefix=st.integers(0, 2), seed=st.integers(0, 2**16))
def test_a_batch_merges_as_its_pictures_do_alone(merger: Merger, n: int, prefix: int, seed: int) -> None:
    """Statement: selecting again gives the same groups, and no picture influences another one."""
    x = drawn(3, prefix + n, seed)
    for stage in merger.stages(tower(prefix)):
        together, again = groups_of(stage, x, prefix), groups_of(stage, x, prefix)
        for b in range(3):
            alone = groups_of(stage, x[b : b + 1], prefix)
            for name in ("keep", "source", "target"):
                assert torch.equal(getattr(together, name)[b], getattr(alone, name)[0])
                assert torch.equal(getattr(together, name), getattr(again, name))


@pytest.mark.parametrize("merger", [ToMe(r=6), PiToMe(ratio=0.8), PiToMe(ratio=0.8, order="plain")], ids=str)
def test_low_precision_metrics_are_compared_in_float32(merger: Merger) -> None:
    """Statement: bfloat16 features give exactly the groups of the same values in float32."""
    x = drawn(2, 41, 3, width=64).bfloat16()
    for stage in merger.stages(tower(1)):
        low = stage.select(BlockTokens(x, 1, stage.removes(41)), **dict.fromkeys(stage.signals, x))
        high = stage.select(BlockTokens(x.float(), 1, stage.removes(41)), **dict.fromkeys(stage.signals, x.float()))
        for name in ("keep", "source", "target"):
            assert torch.equal(getattr(low, name), getattr(high, name))


def test_a_dead_row_attracts_nothing() -> None:
    """Statement: a row of zeros is similar to nothing; it makes no NaN and no row merges into it where others match
    better.
    """
    x = drawn(1, 20, 0).abs()
    x[0, 5] = 0
    (stage,) = ToMe(r=8).stages(tower(0, 1))
    groups = groups_of(stage, x, 0)
    assert 5 not in groups.keep.gather(1, groups.target)
    assert not similarity_energy(x, 0.5).isnan().any()


def test_isolated_tokens_are_protected() -> None:
    """Statement: PiToMe pairs the tokens of highest energy; tokens unlike all others stay what they are."""
    cluster = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    x = torch.cat([drawn(1, 8, 1, width=32), cluster + 0.1 * drawn(1, 12, 2, width=32)], dim=1)
    energy = similarity_energy(x, 0.5)
    groups = protected_matching(x, energy, 6)
    assert set(groups.source[0].tolist()) | set(groups.keep.gather(1, groups.target)[0].tolist()) <= set(range(8, 20))
    order = ranked(energy)
    assert torch.equal(groups.source[0], order[0, 0:12:2]), "sources and targets take turns along the ranking"


def test_the_best_pairs_of_the_energy_ranking_merge() -> None:
    """Statement: without protection the r most similar pairs between even and odd ranks merge."""
    x = drawn(1, 21, 4, width=8)
    energy = similarity_energy(x, 0.5)
    groups = energy_matching(x, energy, 5)
    order = ranked(energy)[0]
    exact = x[0].double()
    similarity = torch.nn.functional.cosine_similarity(exact[order[0::2], None], exact[None, order[1::2]], dim=-1)
    best = similarity.amax(dim=1).argsort(descending=True)[:5]
    assert groups.source[0].tolist() == order[0::2][best].tolist()
    assert groups.keep.gather(1, groups.target)[0].tolist() == order[1::2][similarity[best].argmax(dim=1)].tolist()


def test_the_orders_differ_in_which_half_protects() -> None:
    """Statement: DeiT protects in the second half of the blocks, MAE in the first, LLaVA from block 13 on."""
    deit, mae, plain, llava = (PiToMe(order=order) for order in ("deit", "mae", "plain", "llava"))
    assert [deit.variant(i, 5) for i in range(5)] == ["bsm_pitome"] * 3 + ["pitome"] * 2
    assert [mae.variant(i, 5) for i in range(5)] == ["pitome"] * 3 + ["bsm_pitome"] * 2
    assert {plain.variant(i, 5) for i in range(5)} == {"pitome"}
    assert [llava.variant(i, 24) for i in (0, 12, 13, 22)] == ["bsm", "bsm", "pitome", "pitome"]
    assert [deit.margin_of(i, 12) for i in (0, 6)] == [0.75, 0.375]
    assert PiToMe(margin=(0.75, 0.35)).margin_of(6, 12) == pytest.approx(0.55)


@pytest.mark.parametrize(("ratio", "kept"), [(0.85, 17), (0.875, 30), (0.9, 54), (0.925, 101), (0.95, 183)])
def test_counts_on_llava_are_the_published_ones(ratio: float, kept: int) -> None:
    """Statement: of LLaVA-1.5's 576 tokens as many stay as in the authors' runs (arXiv 2405.16148, LLaVA table)."""
    assert PiToMe(ratio=ratio, order="llava").count(Layout.grid(24, 24)) == kept


def test_counts_on_vit_are_the_published_ones() -> None:
    """Statement: rows per block of a 12-block ViT at 224 px, ratio 0.9."""
    rows = PiToMe(ratio=0.9).counts(196, tower(1, 12))
    assert rows == (197, 178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66, 60)
    assert ToMe(r=13).counts(196, tower(1, 12))[-1] == 197 - 12 * 13


def test_views_are_counted_whole() -> None:
    """Statement: crops are merged before their padding is cut off, so their count is bounded by what that leaves."""
    layout = Layout(
        (View(4, 4, kind="thumbnail"), View(4, 2, start=16, kind="crop"), View(4, 4, start=24, kind="crop"))
    )
    model = tower(1)
    whole = ToMe(r=2).count(Layout.grid(4, 4), model)
    assert whole == 8
    assert ToMe(r=1).count(layout, model) == 12 + 8 + 12


def test_schedules_of_a_single_block() -> None:
    """Statement: a tower of one block merges r whatever the inflection."""
    assert schedule(7, 1, -1.0) == [7]
    assert schedule((7,), 3) == [7, 0, 0]


def test_keeping_everything_merges_nothing() -> None:
    """Statement: r = 0 and ratio = 1 take no row away."""
    for merger in (ToMe(r=0), ToMe(ratio=1.0), PiToMe(ratio=1.0), PiToMe(ratio=1.0, order="llava")):
        assert merger.count(Layout.grid(14, 14)) == 196


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (ToMe, {"r": -1}),
        (ToMe, {"r": 2.5}),
        (ToMe, {"r": "8"}),
        (ToMe, {"r": (4, -1)}),
        (ToMe, {"r": (4, 4), "inflection": 0.5}),
        (ToMe, {"inflection": 2.0}),
        (ToMe, {"ratio": 0.0}),
        (ToMe, {"k": 1}),
        (ToMe, {"matching": "best"}),
        (PiToMe, {"ratio": 1.5}),
        (PiToMe, {"ratio": (0.9, 0.0)}),
        (PiToMe, {"ratio": True}),
        (PiToMe, {"order": "clip"}),
        (PiToMe, {"margin": (0.9, 0.5, 0.1)}),
        (PiToMe, {"metric": "values"}),
    ],
)
def test_bad_parameters_are_refused(cls: type[Merger], given: dict[str, object]) -> None:
    """Statement: a value that means nothing is refused when the method is configured."""
    with pytest.raises(ParameterError):
        cls(**given)


def test_windowed_towers_are_refused_by_name() -> None:
    """Statement: a tower whose attention stays inside windows is refused, and the message names it."""
    windows = replace(tower(0), tower="WindowedTower", full_attention=(1, 3))
    with pytest.raises(UnsupportedModelError, match="WindowedTower"):
        ToMe().stages(windows)
    with pytest.raises(FoveateError, match="pitome"):
        PiToMe().stages(windows)
