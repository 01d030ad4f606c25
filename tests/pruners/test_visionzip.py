"""VisionZip: dominant and contextual tokens, the class token, the order of crops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.errors import BudgetError, MissingSignalError, ParameterError
from foveate.pruners import Layout, Selection, Tokens, VisionZip
from foveate.pruners.core.signals import ReceivedAttention
from foveate.pruners.visionzip import assign, complement, merge
from tests.pruners.synthetic import CLIP, QWEN, C, anyres, first_stage, make_signals, make_tokens, run


def visionzip_by_definition(
    embeds: Tensor, attention: Tensor, keys: Tensor, features: Tensor, dominant: int, contextual: int
) -> tuple[list[int], list[int], Tensor, dict[int, int]]:
    """One image, one token at a time: dominant patches, targets, merged features, member -> target."""
    n = len(attention)
    best = sorted(sorted(range(n), key=lambda i: (-float(attention[i]), i))[:dominant])
    rest = [i for i in range(n) if i not in best]
    step = max(1, len(rest) // contextual)
    targets = [rest[i * step] for i in range(contextual)]
    x = normalize(keys.double(), dim=-1)
    home = {i: max(targets, key=lambda t: float(x[i] @ x[t])) for i in rest if i not in targets}
    merged = []
    for t in targets:
        members = [features[i] for i, own in home.items() if own == t]
        merged.append(features[t] + (sum(members) / len(members) if members else 0))
    return best, targets, torch.stack(merged), home


def select(method: VisionZip, tokens: Tokens, *signals: Tensor | None) -> Selection:
    """With attention, keys, features and class features, of which the last may be missing."""
    names = ("attention", "keys", "features", "class_features")
    return method.select(tokens, **{name: x for name, x in zip(names, signals) if x is not None})


@pytest.mark.parametrize("class_token", [True, False])
def test_visionzip_against_its_definition(class_token: bool) -> None:
    """Statement: dominant tokens, targets, merged values, owners and order of entry are those of the definition."""
    tokens = make_tokens(Layout.grid(6, 6), 2, 5)
    g = torch.Generator().manual_seed(1)
    attention, keys = torch.rand(2, 36, generator=g), torch.randn(2, 36, C, generator=g)
    features, klass = torch.randn(2, 36, C, generator=g), torch.randn(2, 1, C, generator=g)
    method = VisionZip(dominant=7, contextual=4)
    chosen = select(method, tokens, attention, keys, features, klass if class_token else None)
    entered = chosen.index.gather(1, chosen.order)
    values = chosen.values.gather(1, chosen.order[..., None].expand(-1, -1, 6))
    for b in range(2):
        best, targets, merged, home = visionzip_by_definition(
            tokens.embeds[b], attention[b], keys[b], features[b], 7 - class_token, 4
        )
        free = [i for i in range(36) if i not in best and i not in targets]
        assert entered[b].tolist() == [*free[: int(class_token)], *best, *targets]
        expected = [tokens.project(klass[b])] if class_token else []
        torch.testing.assert_close(values[b], torch.cat([*expected, tokens.embeds[b, best], tokens.project(merged)]))
        for token, target in home.items():
            hosts_class = class_token and token == free[0]
            assert chosen.owner[b, token] == (token if hosts_class else target)


@pytest.mark.parametrize(
    ("k", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (32, (27, 5)), (1, (1, 0)), (2, (2, 0))]
)
def test_visionzip_splits_as_published(k: int, split: tuple[int, int]) -> None:
    """Statement: budgets divide 54 : 10, which gives every split that was published."""
    assert VisionZip(keep=k).split(k) == split


def test_visionzip_alone_keeps_the_class_token() -> None:
    """Statement: a budget of one is the class token where there is one, else the most attended patch."""
    tokens = make_tokens(Layout.grid(3, 3), 1, 0)
    g = torch.Generator().manual_seed(0)
    attention, keys, features = torch.rand(1, 9, generator=g), torch.randn(1, 9, C), torch.randn(1, 9, C)
    klass = torch.randn(1, 1, C)
    with_class = select(VisionZip(keep=1), tokens, attention, keys, features, klass)
    torch.testing.assert_close(with_class.values, tokens.project(klass))
    without = select(VisionZip(keep=1), tokens, attention, keys, features)
    assert without.index.tolist() == [[int(attention.argmax())]]


def test_visionzip_merges_in_front_of_the_decoder_without_projector() -> None:
    """Statement: where tokens are merged on the way (no per-token projector), decoder embeddings are merged."""
    tokens = make_tokens(Layout.grid(4, 4), 1, 0)
    tokens.project = None
    g = torch.Generator().manual_seed(0)
    attention, keys = torch.rand(1, 16, generator=g), torch.randn(1, 16, C, generator=g)
    chosen = select(VisionZip(dominant=3, contextual=2), tokens, attention, keys, torch.full((1, 16, C), torch.nan))
    _, _, merged, _ = visionzip_by_definition(tokens.embeds[0], attention[0], keys[0], tokens.embeds[0], 3, 2)
    torch.testing.assert_close(chosen.values.gather(1, chosen.order[..., None].expand(-1, -1, 6))[0, 3:], merged)


def test_visionzip_refuses_more_than_a_view_has() -> None:
    """Statement: at most N + 1 tokens with a class token, N without; empty views do not count, ``keep`` is capped as
    ever.
    """
    layout = anyres((4, 4), [3, 0], [3, 2])  # the smallest view that is not empty: 3 x 2
    tokens = make_tokens(layout, 1, 0)
    for dominant, contextual, class_token, fits in [
        (4, 3, True, True),
        (5, 3, True, False),
        (4, 2, False, True),
        (4, 3, False, False),
    ]:
        method, model = VisionZip(dominant=dominant, contextual=contextual), CLIP if class_token else QWEN
        if fits:
            assert run(method, tokens, model).index.shape[1] == method.count(layout)
        else:
            asked = dominant + contextual
            with pytest.raises(BudgetError, match=rf"{dominant} and .*{contextual} ask for {asked} .* 3 x 2 has 6"):
                run(method, tokens, model)
    with pytest.raises(BudgetError, match="ask for 8 tokens"):
        VisionZip(dominant=5, contextual=3).count(layout)
    assert VisionZip(keep=layout.size).count(layout) == layout.size


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_visionzip_in_half_precision(features_dtype: torch.dtype) -> None:
    """Statement: features of any precision are merged in float32 and reach the decoder in the tokens' precision."""
    tokens = make_tokens(Layout.grid(4, 4), 2, 0)
    exact, seen = tokens.project, []

    def project(features: Tensor) -> Tensor:
        seen.append(features.dtype)
        return exact(features.float()).bfloat16()

    stage = first_stage(VisionZip(dominant=5, contextual=3))
    signals = make_signals(stage, tokens, 0)
    for name in ("features", "class_features"):
        signals[name] = signals[name].to(features_dtype)
    expected = stage.select(tokens, **{name: signal.float() for name, signal in signals.items()})
    tokens.embeds, tokens.project = tokens.embeds.bfloat16(), project
    chosen = stage.select(tokens, **signals)
    assert seen == [torch.float32, features_dtype]
    assert chosen.values.dtype == torch.bfloat16
    assert torch.equal(chosen.index, expected.index)
    torch.testing.assert_close(chosen.values, expected.values.bfloat16())


def test_visionzip_needs_a_way_for_the_class_token() -> None:
    """Statement: a class token that no projector takes to the decoder is an error that names other methods."""
    tokens = make_tokens(Layout.grid(4, 4), 1, 0)
    tokens.project = None
    with pytest.raises(MissingSignalError, match=r"no projector.*hiprune"):
        run(VisionZip(keep=4), tokens)


def test_visionzip_order_of_crops() -> None:
    """Statement: thumbnail first; then the crops' dominant patches in raster order of the canvas; then class and merged
    tokens.
    """
    layout = anyres((3, 3), [3], [3, 3])
    tokens = make_tokens(layout, 1, 0)
    chosen = run(VisionZip(dominant=3, contextual=2), tokens)
    entered = chosen.index.gather(1, chosen.order)[0]
    kinds = [next(v.kind for v in layout.views if int(t) in v.tokens().tolist()) for t in entered]
    assert kinds == ["thumbnail"] * 5 + ["crop"] * 10
    patches = entered[5:9]
    assert (patches.diff() > 0).all()
    unchanged = (chosen.values[0] == tokens.embeds[0, chosen.index[0]]).all(dim=1)[chosen.order[0]]
    assert unchanged.tolist() == [False, True, True, False, False] + [True] * 4 + [False] * 6


def test_visionzip_without_class_token_reads_received_attention() -> None:
    """Statement: towers without class token are ranked by the attention each token receives from all."""
    assert first_stage(VisionZip(), QWEN).signals["attention"] == ReceivedAttention(31)
    assert "class_features" not in first_stage(VisionZip(), QWEN).signals


def test_visionzip_pieces() -> None:
    """Statement: complement, target spacing and the target-plus-mean rule on an example worked by hand."""
    assert complement(torch.tensor([[3, 0]]), 5).tolist() == [[1, 2, 4]]
    keys = torch.tensor([[[1.0, 0], [0, 1.0], [0.9, 0.1], [0.1, 0.9], [1.0, 0.1]]])
    rest = torch.arange(5)[None]
    targets, assigned = assign(keys, rest, 2)  # step 2: tokens 0 and 2
    assert targets.tolist() == [[0, 2]]
    assert assigned.tolist() == [[0, 2, 2, 2, 2]]
    hidden = torch.arange(5.0)[None, :, None]
    assert merge(hidden, rest, targets, assigned).flatten().tolist() == pytest.approx([0.0, 2 + (1 + 3 + 4) / 3])


@pytest.mark.parametrize(
    "wrong", [{"dominant": 5}, {"dominant": 0, "contextual": 3}, {"dominant": 3, "contextual": -1}]
)
def test_visionzip_bad_splits(wrong: dict[str, int]) -> None:
    """Statement: half a split, or one without dominant tokens, is refused."""
    with pytest.raises((ParameterError, BudgetError), match=r"dominant=|contextual="):
        VisionZip(**wrong)
