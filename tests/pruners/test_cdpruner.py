"""CDPruner: the determinantal point process, and relevance by embeddings or CLIP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.cuda import conditional_dpp
from foveate.errors import MissingSignalError, ParameterError
from foveate.pruners import (
    CDPruner,
    ClipText,
    Layout,
)
from foveate.pruners.cdpruner import similarity, stretch
from foveate.pruners.core.signals import EncoderFeatures
from tests.pruners.synthetic import QWEN, C, first_stage, make_tokens


def dpp_by_definition(features: Tensor, relevance: Tensor, k: int) -> list[int]:
    """Greedy MAP by determinants in float64."""
    x = normalize(features.double(), dim=-1)
    kernel = relevance.double()[:, None] * (x @ x.T) * relevance.double()
    chosen: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(x)) if i not in chosen]
        volume = {i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in left}
        chosen.append(max(left, key=lambda i: (volume[i], -i)))
    return chosen


def test_dpp_maximises_the_determinant_greedily() -> None:
    """Statement: every pick makes the kernel's determinant as large as one more token can."""
    g = torch.Generator().manual_seed(0)
    features, relevance = torch.randn(2, 14, 9, generator=g), torch.rand(2, 14, generator=g) + 0.1
    picks = conditional_dpp(features, relevance, 6)
    for b in range(2):
        assert picks[b].tolist() == dpp_by_definition(features[b], relevance[b], 6)


def test_dpp_beyond_its_rank() -> None:
    """Statement: once the rank is used up the lowest free tokens follow, without NaN or repetition."""
    g = torch.Generator().manual_seed(3)
    features, relevance = torch.randn(1, 12, 3, generator=g), torch.rand(1, 12, generator=g) + 0.1
    picks = conditional_dpp(features, relevance, 8)[0].tolist()
    assert picks[:3] == dpp_by_definition(features[0], relevance[0], 3)
    assert picks[3:] == [i for i in range(12) if i not in picks[:3]][:5]


def test_dpp_of_equal_relevance_starts_at_the_lowest_index() -> None:
    """Statement: all first gains tie when relevance is constant, and round-off of the norms does not break the tie."""
    for seed in range(20):
        features = torch.randn(1, 40, 7, generator=torch.Generator().manual_seed(seed))
        assert int(conditional_dpp(features, torch.ones(1, 40), 1)) == 0


def test_constant_relevance_is_a_plain_dpp() -> None:
    """Statement: equal relevance, up to float32 noise, becomes ones instead of a division by zero."""
    assert torch.equal(stretch(torch.full((1, 4), 0.3) + torch.tensor([0, 1e-8, 0, 0])), torch.ones(1, 4))
    spread = stretch(torch.tensor([[0.0, 1.0, 3.0]]))
    torch.testing.assert_close(
        spread, torch.tensor([[1e-6, 1.0, 3.0]]) / torch.tensor([3.0, 3.0, 3.0]), atol=1e-6, rtol=0
    )


def test_relevance_is_stretched_per_image_over_all_crops() -> None:
    """Statement: minimum and maximum are taken over the crops of an image together, never across images."""
    layout = Layout.video(2, 1, 3)
    tokens = make_tokens(layout, 2, 0)
    tokens.embeds[0, :3] *= 0  # irrelevant crop of the first image
    scores = CDPruner(keep=2).select(tokens).scores
    expected = torch.stack([stretch(similarity(tokens.embeds[[b]], tokens.instruction[[b]]))[0] for b in range(2)])
    torch.testing.assert_close(scores, expected)


def test_masked_words_do_not_count() -> None:
    """Statement: padding of the instruction changes nothing, and an image without text gets a plain DPP."""
    tokens = make_tokens(Layout.grid(4, 4), 2, 1)
    tokens.instruction_mask = torch.tensor([[True, True, False], [False, False, False]])
    tokens.instruction = tokens.instruction.masked_fill(~tokens.instruction_mask[..., None], 7.0)
    scores = CDPruner(keep=3).select(tokens).scores
    torch.testing.assert_close(scores[0], stretch(similarity(tokens.embeds[:1], tokens.instruction[:1, :2]))[0])
    assert torch.equal(scores[1], torch.ones(16))
    silent = CDPruner(keep=3, relevance="none").select(tokens)
    assert torch.equal(silent.index[1], CDPruner(keep=3).select(tokens).index[1])


class Words:
    """A tokenizer whose words are numbers."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i == 0))

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(int(word) for word in text.split()), 2]}


def tiny_clip() -> ClipText:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={"hidden_size": 8, "vocab_size": 64, "max_position_embeddings": 5, "eos_token_id": 2, **shared},
        vision_config={"hidden_size": C, "image_size": 8, "patch_size": 4, **shared},
        projection_dim=7,
    )
    return ClipText(CLIPModel(config).eval(), Words(), Words())


def test_clip_text_is_cut_into_segments() -> None:
    """Statement: text longer than the text tower becomes several zero-padded segments; shorter samples have fewer."""
    clip = tiny_clip()
    ids = torch.tensor([[9, 8, 7, 6, 5, 4], [3, 0, -1, -1, -1, -1]])
    embeds, exists = clip.text_embeds(ids)
    assert exists.tolist() == [[True, True], [True, False]]
    words = torch.tensor([[1, 9, 8, 7, 6], [5, 4, 2, 0, 0], [1, 3, 2, 0, 0]])
    with torch.no_grad():
        expected = clip.model.get_text_features(words, return_dict=True).pooler_output
    torch.testing.assert_close(embeds[exists], expected)


def test_clip_relevance_is_negated() -> None:
    """Statement: with CLIP the patches *least* similar to the text count most, through post-norm and projection."""
    method = CDPruner(keep=3, clip=tiny_clip())
    assert dict(first_stage(method).signals) == {"features": EncoderFeatures(22)}
    tokens = make_tokens(Layout.grid(4, 4), 1, 0)
    tokens.instruction_ids = torch.tensor([[9, 8, 7]])
    features = torch.randn(1, 16, C, generator=torch.Generator().manual_seed(0))
    scores = method.select(tokens, features=features).scores
    with torch.no_grad():
        image = clip_space(method.clip, features)
        text, _ = method.clip.text_embeds(tokens.instruction_ids)
    cosine = normalize(image, dim=-1) @ normalize(text, dim=-1).mT
    falling = cosine[0, scores[0].argsort(), 0]
    assert (falling.diff() < 1e-6).all()
    assert falling[0] - falling[-1] > 0.1


def clip_space(clip: ClipText, features: Tensor) -> Tensor:
    return clip.model.visual_projection(clip.model.vision_model.post_layernorm(features))


def test_clip_of_another_tower_is_refused() -> None:
    """Statement: a CLIP model that cannot read the tower's features is named, with the way out."""
    with pytest.raises(MissingSignalError, match=r"9 channels.*reads 5"):
        tiny_clip().image_embeds(torch.zeros(1, 2, 9))
    with pytest.raises(ParameterError, match="contradicts"):
        CDPruner(relevance="none", clip=tiny_clip())
    with pytest.raises(MissingSignalError, match="Qwen2_5_VisionTransformer"):
        CDPruner(clip=tiny_clip()).stages(QWEN)


def test_bad_parameters_are_named() -> None:
    """Statement: an unknown choice is refused with its value."""
    with pytest.raises(ParameterError, match="clip"):
        CDPruner(relevance="clip")
