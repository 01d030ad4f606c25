"""Videos under QuoTA on the attached model: what the decoder sees, frame by frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import interpolate

import foveate
from foveate.adapters.families.base import adapter_for
from foveate.errors import InputError, ParameterError
from foveate.pruners.core import AtEntry, Pruner, Selection, Stage
from foveate.pruners.core.allocation import frame_budgets, frame_grid, frame_weights, scores_per_view
from tests.models import VIDEO, VIDEO_FAMILIES, VISION_END, VISION_START, inputs, picture, tiny

ENCODES_ONCE = hasattr(transformers.GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")

SHAPE = (4, 4, 4)
SCORES = [0.9, 0.0, 0.5, 0.3]
QWEN = tuple(family for family in VIDEO_FAMILIES if family.startswith("qwen"))


def video_inputs(family: str, videos: int = 1) -> dict[str, Any]:
    samples = [[3, picture(family, 2, SHAPE), 5], [6, picture(family, 3, SHAPE), 9]]
    return inputs(family, samples[:videos])


def shares(family: str, size: int, total: int, scores: list[float]) -> list[int]:
    cap = "waterfill" if family in QWEN else "none"
    return frame_budgets(frame_weights(torch.tensor(scores).double().numpy()), total, size, cap)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_the_decoder_sees_resampled_frames(family: str) -> None:
    """Statement: the pruned model equals its decoder run by hand on interpolated frames.

    Frames and DeepStack levels are interpolated alike, cells stand at the position of the token under their centre, and
    a vanished frame takes its timestamp, start and end of vision along.
    """
    model, given = tiny(family), video_inputs(family)
    seen, unpooled = observed(model, given)
    ids, embeds = given["input_ids"][0], seen["inputs_embeds"][0]
    places = (ids == VIDEO).nonzero()[:, 0]
    side = 4 if family in QWEN else 2  # LLaVA-OneVision pools 4 x 4 patches to 2 x 2 tokens
    source = embeds[places][: 4 * side * side].view(4, side, side, -1)
    levels = [x.view(4, side, side, -1) for x in seen.get("deepstack_visual_embeds") or []]
    frames = source if family in QWEN else unpooled.view(4, 4, 4, -1)
    keep = 26 if family in QWEN else 9
    parts: list[tuple[Tensor, Tensor, list[Tensor] | None]] = []
    before = 0
    for t, share in enumerate(shares(family, frames[0, ..., 0].numel(), keep, SCORES)):
        first = int(places[t * side * side])
        last = int(places[(t + 1) * side * side - 1])
        head, tail = (first - 2, last + 2) if family == "qwen3_vl" else (first, last + 1)
        keeps_text = share > 0
        parts.append(text_part(embeds, range(before, first if keeps_text else head), levels))
        if share:
            h, w = frame_grid(share, tuple(frames.shape[1:3]), limited=family in QWEN)
            at = torch.tensor(
                [
                    first + (2 * i + 1) * side // (2 * h) * side + (2 * j + 1) * side // (2 * w)
                    for i in range(h)
                    for j in range(w)
                ]
            )
            parts.append((at, resized(frames[t], h, w), [resized(level[t], h, w) for level in levels]))
        before = last + 1 if keeps_text else tail
    parts.append(text_part(embeds, range(before, len(ids)), levels))

    with foveate.attach(model, foveate.QuoTA(keep=keep)) as session:
        session.frame_scores = [SCORES]
        pruned = model(**given).logits[0]
        trace = session.trace
    at, short = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])[None]
    more = {}
    if levels:
        more["visual_pos_masks"] = torch.cat([torch.full((len(p[0]),), p[2] is not None) for p in parts])[None]
        more["deepstack_visual_embeds"] = [
            torch.cat([p[2][i] for p in parts if p[2] is not None]) for i in range(len(levels))
        ]
    if family in QWEN:
        positions = seen["position_ids"][-3:, :, at]
    else:
        positions = torch.arange(len(at))[None]
    everything = torch.ones(short.shape[:2], dtype=torch.long)
    hidden = model.model.language_model(inputs_embeds=short, attention_mask=everything, position_ids=positions, **more)
    reference = model.lm_head(hidden.last_hidden_state)[0]
    text = (ids != VIDEO) & (ids != VISION_START) & (ids != VISION_END)
    stays = torch.isin(torch.arange(len(ids)), at) & text
    assert reference[text[at]].abs().max() > 0.5, "the case is numerically trivial"
    assert (reference[text[at]] - pruned[stays]).abs().max() < 1e-5
    assert trace.images[0].text_gone_per_layer == [3 if family == "qwen3_vl" else 0] * 4


def observed(model: torch.nn.Module, given: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """What the decoder is called with, and what a projector made of each frame."""
    seen: dict[str, Any] = {}
    made: list[Tensor] = []
    projector = getattr(model.model, "multi_modal_projector", None)
    handles = [
        model.model.language_model.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    ]
    if projector is not None:
        handles.append(projector.register_forward_hook(lambda m, a, output: made.append(output)))
    model(**given)
    for handle in handles:
        handle.remove()
    return seen, made[0] if made else None


def text_part(embeds: Tensor, places: range, levels: list[Tensor]) -> tuple[Tensor, Tensor, None]:
    at = torch.tensor(list(places), dtype=torch.long)
    return at, embeds[at], None


def resized(frame: Tensor, h: int, w: int) -> Tensor:
    return interpolate(frame.permute(2, 0, 1)[None], (h, w), mode="bilinear")[0].flatten(1).T


@pytest.mark.parametrize("assigner", ["bilinear", "adaptive_avg", "linspace", "tome", "separable_tome"])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_a_batch_of_videos_answers_as_single_ones(family: str, assigner: str) -> None:
    """Statement: batched generation equals singles token by token, each video with its own scores."""
    model, batch = tiny(family), video_inputs(family, 2)
    scores = [SCORES, [0.1, 0.2, 0.0, 0.8]]
    with foveate.attach(model, foveate.QuoTA(keep=0.4, assigner=assigner)) as session:
        session.frame_scores = scores
        together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for row, sample in enumerate([[3, picture(family, 2, SHAPE), 5], [6, picture(family, 3, SHAPE), 9]]):
            single = inputs(family, [sample])
            width = single["input_ids"].shape[1]
            single["input_ids"] = batch["input_ids"][row : row + 1, -width:]
            session.frame_scores = [scores[row]]
            alone = model.generate(**single, max_new_tokens=6, do_sample=False)[:, width:]
            assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)
            if not ENCODES_ONCE:  # then the scores are used up by the first token
                continue
            session.frame_scores = [scores[row]]
            uncached = model.generate(**single, max_new_tokens=6, do_sample=False, use_cache=False)[:, width:]
            assert torch.equal(uncached, alone)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_a_full_budget_and_a_pause_are_bit_equal(family: str) -> None:
    """Statement: keep=1.0 changes nothing; inside paused() the model is unpruned and the session keeps what it had."""
    model, given = tiny(family), video_inputs(family)
    before, tokens = model(**given).logits, model.generate(**given, max_new_tokens=4, do_sample=False)
    with foveate.attach(model, foveate.QuoTA(keep=1.0)):
        assert torch.equal(model(**given).logits, before)
    with foveate.attach(model, foveate.QuoTA(keep=0.3)) as session:
        session.frame_scores = [SCORES]
        pruned, trace = model(**given).logits, session.trace
        assert not torch.equal(pruned, before)
        session.frame_scores = [SCORES]
        with session.paused():
            assert torch.equal(model(**given).logits, before)
            assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), tokens)
        assert session.trace is trace
        assert torch.equal(model(**given).logits, pruned), "scores set before the pause still stand"


@pytest.mark.parametrize("family", QWEN)
@torch.no_grad()
def test_fused_frames_count_with_the_mean_of_their_scores(family: str) -> None:
    """Statement: one score per sampled frame may be given where the tower fuses two, also an odd number of them."""
    model, given = tiny(family), video_inputs(family)
    single = [0.8, 1.0, 0.1, 0.1, 0.5, 0.3, 0.2]
    fused = scores_per_view(torch.tensor(single).double().numpy(), 4, 2)
    with foveate.attach(model, foveate.QuoTA(keep=0.4)) as session:
        session.frame_scores = [single]
        found = model(**given).logits
        session.frame_scores = [fused]
        assert torch.equal(model(**given).logits, found)


@torch.no_grad()
def test_scores_that_do_not_fit_are_refused_and_used_up() -> None:
    """Statement: no scores, those of another number of videos or frames, and those of the last call are errors; the
    model stays usable."""
    model, given = tiny("qwen2_5_vl"), video_inputs("qwen2_5_vl", 2)
    with foveate.attach(model, foveate.QuoTA(keep=0.4)) as session:
        for scores, message in (
            (None, "set session"),
            ([SCORES], "frame_scores has 1 entries, the call brings 2 videos"),
            ([SCORES, [0.1, 0.2]], "2 frame scores for a video of 4 views"),
            ([SCORES, [0.1, -0.2, 0.1, 0.1]], "frame 1 has the score -0.2"),
        ):
            session.frame_scores = scores
            with pytest.raises((InputError, ParameterError), match=message):
                model(**given)
        session.frame_scores = [SCORES, SCORES]
        model(**given)
        with pytest.raises(InputError, match="set session"):
            model(**given)
        assert not session.attached or session.frame_scores is None


@torch.no_grad()
def test_frame_text_goes_only_where_the_method_says_so() -> None:
    """Statement: other methods that empty a frame leave its timestamp and markers in place."""

    class FirstFrame(Pruner):
        name = "first_frame"

        def __init__(self, empty_frames: str) -> None:
            object.__setattr__(self, "empty_frames", empty_frames)

        def stages(self, model: Any) -> tuple[Stage, ...]:
            return (AtEntry(self.select, empty_frames=self.empty_frames),)

        def parameters(self) -> dict[str, Any]:
            return {}

        def select(self, tokens: Any) -> Selection:
            return Selection(torch.arange(tokens.layout.views[0].size).expand(len(tokens.embeds), -1))

    model, given = tiny("qwen3_vl"), video_inputs("qwen3_vl")
    for policy, gone in (("keep", 0), ("drop", 9)):
        widths: list[int] = []
        with foveate.attach(model, FirstFrame(policy)) as session:
            handle = model.model.language_model.layers[0].register_forward_pre_hook(
                lambda m, args, widths=widths: widths.append(args[0].shape[1])
            )
            model(**given)
            handle.remove()
        assert widths == [given["input_ids"].shape[1] - 48 - gone]
        assert session.trace.images[0].text_gone_per_layer[0] == gone


def test_timestamps_are_found_by_their_ends() -> None:
    """Statement: a frame's text is its timestamp and markers; the second's form tells the first's from the prompt."""
    adapter = adapter_for(tiny("qwen3_vl"))
    start, end, less, more = VISION_START, VISION_END, 60, 61
    first, second = [less, 5, 6, more, start, VIDEO, VIDEO, end], [less, 7, 8, 9, more, start, VIDEO, VIDEO, end]
    prompt = [3, 4, start]  # the chat template's own marker in front of a video
    ids = [*prompt, *first, *second, end, 3]
    found = adapter.frame_text(ids, [(8, 9), (17, 18)])
    assert found == [[3, 4, 5, 6, 7, 10], [11, 12, 13, 14, 15, 16, 19]]
    ids[3] = 59  # swallowed by another token: the first timestamp stays, its markers go
    assert adapter.frame_text(ids, [(8, 9), (17, 18)])[0] == [7, 10]
