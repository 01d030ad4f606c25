"""What an attached model must go on doing, and what attaching must never do."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
import transformers

import foveate
from foveate.adapters import compat
from foveate.pruners.core import AtEntry, BeforeLayer, ModelInfo, Selection, Stage, Tokens
from foveate.pruners.core.merging import Merger
from tests.models import FAMILIES, IMAGE, cache_of, cached, inputs, picture, tiny
from tests.pruners.synthetic import TopNorm
from tests.test_oracles import dropped_places, masked_logits, rope_positions, scene_inputs

STAGED = TopNorm(at_input=0.6, at_layer=((2, 0.5),))
# newer transformers encode a picture before generating, older ones once per beam
ENCODES_ONCE = hasattr(transformers.GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", FAMILIES)
def test_manual_decoding_with_the_cache_equals_generate(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "padded")
    with foveate.attach(model, STAGED):
        expected = model.generate(**given, **GREEDY)
        grown = model.generate(
            **given, **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}, return_dict_in_generate=True
        )
        assert torch.equal(grown.sequences, expected[:, :-3])
        continued = dict(given, input_ids=grown.sequences, attention_mask=_ones_behind(given, grown.sequences))
        for name in ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"):
            continued.pop(name, None)
        if "mm_token_type_ids" in continued:
            width = grown.sequences.shape[1] - continued["mm_token_type_ids"].shape[1]
            continued["mm_token_type_ids"] = torch.nn.functional.pad(continued["mm_token_type_ids"], (0, width))
        rest = model.generate(
            **continued, **cached(model, cache_of(grown)), **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
        )
        assert torch.equal(rest, expected)


def _ones_behind(given: dict[str, Any], sequences: torch.Tensor) -> torch.Tensor:
    mask = given["attention_mask"]
    return torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_tokens_behind_a_returned_cache_equal_one_call(family: str, positions: str) -> None:
    """Multi-token continuation: logits of the tail are those of a single prefill of head and tail."""
    model, given = tiny(family), scene_inputs(family, "single")
    length = given["input_ids"].shape[1]
    tail = torch.tensor([[11, 12, 13, 14]])
    with foveate.attach(model, STAGED, positions=positions):
        whole_given = dict(given, input_ids=torch.cat([given["input_ids"], tail], 1))
        whole_given["attention_mask"] = torch.ones_like(whole_given["input_ids"])
        if "mm_token_type_ids" in given:
            whole_given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, 4))
        whole = model(**whole_given).logits[:, length:]
        cache = cache_of(model(**given, use_cache=True))
        assert cache.get_seq_length() == length
        part = model(input_ids=tail, **cached(model, cache), attention_mask=whole_given["attention_mask"]).logits
        assert cache.get_seq_length() == length + 4
    assert (part - whole).abs().max() < 1e-5


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize(
    "pruner", [TopNorm(at_input=0.5), STAGED, TopNorm(at_input=0.5, at_layer=((1, 0.5), (3, 0.5)))]
)
def test_two_turns_with_a_picture_each_equal_one_call(pruner: TopNorm, positions: str) -> None:
    """A later turn's picture is pruned behind a pruned cache, and counts on at every layer where that one left off."""
    model = tiny("llava")
    first, second = picture("llava", 1), picture("llava", 2)
    whole = inputs("llava", [[3, first, 4, second, 3]])
    width, total = 3 + 16 + 4, whole["input_ids"].shape[1]
    with foveate.attach(model, pruner, positions=positions) as session:
        expected = model(**whole).logits[0, width:]
        alive = ~dropped_places(whole, session.trace, 4)[3][0, width:]
        head = {"input_ids": whole["input_ids"][:, :width], "pixel_values": first.pixels[None]}
        cache = cache_of(model(**head, attention_mask=torch.ones(1, width), use_cache=True))
        tail = {"input_ids": whole["input_ids"][:, width:], "pixel_values": second.pixels[None]}
        found = model(**tail, attention_mask=torch.ones(1, total), **cached(model, cache)).logits[0]
        assert cache.get_seq_length() == total
        assert len(session.trace.images) == 1
    assert (found - expected)[alive].abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_equal_masked_beams(family: str) -> None:
    """Beam search on the pruned model returns what beam search over masked logits would: its score is theirs."""
    model, given = tiny(family), scene_inputs(family, "single")
    with foveate.attach(model, TopNorm(at_input=0.6, at_layer=((2, 0.5),)), positions="keep") as session:
        out = model.generate(
            **given, num_beams=3, do_sample=False, max_new_tokens=4, min_new_tokens=4, length_penalty=0.0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        trace = session.trace
    assert len(trace.images) == (1 if ENCODES_ONCE else 3)
    gone = dropped_places(given, trace, 4)
    positions = rope_positions(model, given)
    score, known = 0.0, dict(given)
    for token in out.sequences[0, -4:]:
        score += masked_logits(model, known, positions, gone)[0, -1].log_softmax(-1)[token].item()
        known["input_ids"] = torch.cat([known["input_ids"], token.view(1, 1)], 1)
        known["attention_mask"] = torch.ones_like(known["input_ids"])
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
        if "mm_token_type_ids" in known:
            known["mm_token_type_ids"] = torch.nn.functional.pad(known["mm_token_type_ids"], (0, 1))
    assert abs(out.sequences_scores[0].item() - score) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_without_a_cache_equals_generation_with_one(family: str) -> None:
    """Pictures are encoded once and come again with every token; what is drawn for them stays."""
    model, given = tiny(family), scene_inputs(family, "padded")
    method = "random" if ENCODES_ONCE else "divprune"  # pictures that are encoded anew are new ones, drawn for anew
    with foveate.attach(model, method, keep=0.5):
        expected = model.generate(**given, **GREEDY)
    with foveate.attach(model, method, keep=0.5):
        assert torch.equal(model.generate(**given, **GREEDY, use_cache=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_is_reproducible_and_returns_several(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "padded")
    with foveate.attach(model, STAGED):
        draws = []
        for _ in range(2):
            torch.manual_seed(5)
            draws.append(model.generate(**given, do_sample=True, num_return_sequences=2, max_new_tokens=4))
        assert torch.equal(*draws)
        assert len(draws[0]) == 4


# -------------------------------------------------------------------------------------------------------- one forward


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_runs_over_the_original_length(family: str) -> None:
    """Labels line up with the user's input: the loss is that of the masked model on the text."""
    model, given = tiny(family), scene_inputs(family, "single")
    labels = given["input_ids"].clone()
    visual_end = int((labels == IMAGE).nonzero()[:, 1].max()) + 2
    labels[:, :visual_end] = -100
    with foveate.attach(model, STAGED, positions="keep") as session:
        loss = model(**given, labels=labels).loss
    positions = rope_positions(model, given)
    logits = masked_logits(model, given, positions, dropped_places(given, session.trace, 4))
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    assert (loss - expected).abs() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_keep_the_original_length(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "padded")
    plain = model(**given, output_hidden_states=True).hidden_states
    with foveate.attach(model, STAGED):
        pruned = model(**given, output_hidden_states=True).hidden_states
    assert [h.shape for h in pruned] == [h.shape for h in plain]
    text = (given["input_ids"] != IMAGE) & given["attention_mask"].bool()
    assert torch.equal(pruned[0][text], plain[0][text])  # embeddings of text are untouched


@pytest.mark.parametrize("text", [5, 60])  # in the second case the batch does not get narrower
def test_hidden_states_show_every_layer_in_its_place(text: int) -> None:
    """With keep positions, the state at layer i is that of the model in which only earlier columns are masked."""
    model, pruner = tiny("llava"), TopNorm(at_layer=((2, 0.4),))
    given = inputs("llava", [[3, picture("llava", 1), 4], [text]])
    given["position_ids"] = rope_positions(model, given)
    plain = model(**given, output_hidden_states=True).hidden_states
    with foveate.attach(model, pruner, positions="keep") as session:
        pruned = model(**given, output_hidden_states=True).hidden_states
    attended = given["attention_mask"].bool()
    for i in range(3):  # nothing is gone in front of layer 2
        assert (pruned[i] - plain[i])[attended].abs().max() < 1e-5
    gone = dropped_places(given, session.trace, 4)[3]
    alive = attended & ~gone
    final = model.model.language_model.norm(pruned[3])  # a state after layer 2 differs, and stands in its own place
    assert torch.isfinite(final[alive]).all()
    assert (pruned[3] - plain[3])[alive].abs().max() > 1e-3
    assert (pruned[3] - plain[3])[1][attended[1]].abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_end_in_a_picture(family: str) -> None:
    """The next token is predicted by the last survivor, wherever the last place went."""
    model, pruner = tiny(family), TopNorm(at_input=0.3)
    given = inputs(family, [[5, picture(family, 3)]])
    positions = rope_positions(model, given)
    extra = {} if positions.ndim == 3 else {"position_ids": positions}
    with foveate.attach(model, pruner, positions="keep") as session:
        logits = model(**given, **extra).logits
    gone = dropped_places(given, session.trace, 4)
    reference = masked_logits(model, given, positions, gone)
    last = (~gone[0][0]).nonzero()[-1, 0]
    assert (logits[0, -1] - reference[0, last]).abs().max() < 1e-5
    assert (logits[0] - logits[0, 5:6]).abs().max() > 1e-3


def test_the_first_word_behind_a_picture_is_learnt_from_the_last_survivor() -> None:
    model = tiny("llava")
    for seed in range(8):
        given = inputs("llava", [[3, picture("llava", seed), 4]])
        with foveate.attach(model, TopNorm(at_input=0.3), positions="keep") as session:
            labels = torch.full_like(given["input_ids"], -100)
            labels[0, 19] = given["input_ids"][0, 19]
            loss = model(**given, labels=labels).loss
        gone = dropped_places(given, session.trace, 4)
        if not gone[0][0, 18]:
            continue
        positions = rope_positions(model, given)
        last = (~gone[0][0, :19]).nonzero()[-1, 0]
        reference = masked_logits(model, given, positions, gone)[0, last]
        assert (loss - torch.nn.functional.cross_entropy(reference, labels[0, 19])).abs() < 1e-5
        return
    pytest.fail("no picture lost its last token")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_pruned_models(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "single")
    with torch.enable_grad(), foveate.attach(model.train(), STAGED):
        model(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.model.language_model.layers.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_what_it_is(family: str, dtype: torch.dtype) -> None:
    """Every method, and selections made in float32 from the half-precision model's own signals."""
    model, given = tiny(family).to(dtype), scene_inputs(family, "padded")
    for name, method in foveate.pruners.PRUNERS.items():
        try:
            session = foveate.attach(model, name, **({"keep": 0.5} if hasattr(method, "keep") else {}))
        except foveate.UnsupportedModelError:
            assert name == "downsample" or (issubclass(method, Merger) and family.startswith("qwen"))
            continue
        with session:
            logits = model(**given).logits
            model.generate(**given, **{**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2})
        assert logits.dtype == dtype
        assert torch.isfinite(logits.float()).all(), name


@pytest.mark.parametrize("name", ["divprune", "fopru", "cdpruner", "fastv", "todre"])
def test_autocast_does_not_coarsen_selections(name: str) -> None:
    """Given the same embeddings and queries, what is chosen does not depend on autocast."""
    from foveate.adapters.taps import exactly
    from foveate.pruners.core import AtEntry, ReceivedAttention

    q, k = torch.randn(2, 1, 4, 300, 16).unbind(0)
    plain = exactly(ReceivedAttention(0).reduce, q, k, 0.25, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exactly(ReceivedAttention(0).reduce, q, k, 0.25, 0), plain)
    seen: list[torch.dtype] = []

    class Watch(TopNorm):
        def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
            def select(tokens: Tokens) -> Selection:
                seen.append((tokens.embeds.float() @ tokens.embeds.float().mT).dtype)
                return Selection(torch.arange(4).expand(len(tokens.embeds), -1))

            return (AtEntry(select),)

    model, given = tiny("llava"), scene_inputs("llava", "single")
    with foveate.attach(model, Watch()), torch.autocast("cpu", torch.bfloat16):
        model(**given)
    assert seen == [torch.float32]
    with foveate.attach(model, name, keep=0.5), torch.autocast("cpu", torch.bfloat16):
        model(**given)


def test_statistics_keep_nothing_for_backward() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    seen: list[bool] = []

    class Watch(TopNorm):
        def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
            def select(tokens: Tokens, received: torch.Tensor) -> Selection:
                seen.append(received.requires_grad)
                return Selection(torch.arange(4).expand(len(tokens.embeds), -1))

            from foveate.pruners.core import AtEntry, ReceivedAttention

            return (AtEntry(select, {"received": ReceivedAttention(2)}),)

    with torch.enable_grad(), foveate.attach(model.train(), Watch()):
        model(**given, labels=given["input_ids"]).loss.backward()
    assert seen == [False]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_prompts_are_left_alone(family: str) -> None:
    model = tiny(family)
    given = {"input_ids": torch.randint(3, 80, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    plain, tokens = model(**given).logits, model.generate(**given, **GREEDY)
    with foveate.attach(model, STAGED) as session:
        assert torch.equal(model(**given).logits, plain)
        assert torch.equal(model.generate(**given, **GREEDY), tokens)
        assert session.trace is None


@pytest.mark.parametrize("text", [6, 60])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_a_mixed_batch_prunes_only_where_there_is_a_picture(family: str, text: int) -> None:
    """Also where the row without a picture is the longest, so that the batch does not get narrower."""
    model = tiny(family)
    given = inputs(family, [[3, picture(family, 1), 4], [text]])
    positions = rope_positions(model, given)
    extra = {} if positions.ndim == 3 else {"position_ids": positions}
    plain = model(**given, **extra).logits
    with foveate.attach(model, TopNorm(at_input=0.6), positions="keep") as session:
        out = model(**given, **extra, use_cache=True)
    attended = given["attention_mask"][1].bool()
    assert (out.logits - plain)[1][attended].abs().max() < 1e-5
    gone = dropped_places(given, session.trace, 4)
    reference = masked_logits(model, given, positions, gone)
    alive = given["attention_mask"][0].bool() & ~gone[0][0]
    assert (out.logits - reference)[0][alive].abs().max() < 1e-5
    with foveate.attach(model, "random"):
        assert cache_of(out).get_seq_length() == given["input_ids"].shape[1]


def test_right_padding_in_training_batches() -> None:
    model = tiny("llava")
    given = inputs("llava", [[2, picture("llava", 1), 4], [5, picture("llava", 2), 9]], pad_left=False)
    positions = rope_positions(model, given)
    with foveate.attach(model, STAGED, positions="keep") as session:
        pruned = model(**given, position_ids=positions).logits
    gone = dropped_places(given, session.trace, 4)
    reference = masked_logits(model, given, positions, gone)
    alive = given["attention_mask"].bool() & ~gone[-1]
    assert (pruned - reference)[alive].abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ attach and detach


def test_hooks_and_attributes_are_gone_after_detaching() -> None:
    model = tiny("llava")
    before = _hooks(model)
    session = foveate.attach(model, STAGED)
    assert _hooks(model) > before
    session.detach()
    session.detach()  # idempotent
    assert _hooks(model) == before
    assert "get_image_features" not in vars(model.model)
    assert not session.attached


def _hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_exception_inside_a_with_block_detaches() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    plain = model(**given).logits
    with pytest.raises(KeyboardInterrupt), foveate.attach(model, STAGED):
        raise KeyboardInterrupt
    assert torch.equal(model(**given).logits, plain)


def test_a_failing_pruner_leaves_the_model_usable() -> None:
    class Broken(TopNorm):
        def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
            def fail(tokens: Tokens) -> Selection:
                raise ZeroDivisionError("inside a stage")

            return (AtEntry(fail),)

    model, given = tiny("llava"), scene_inputs("llava", "single")
    plain = model(**given).logits
    session = foveate.attach(model, Broken())
    with pytest.raises(ZeroDivisionError):
        model(**given)
    assert session.trace is None
    assert not session.call.items  # nothing is held on to
    assert not session.call.encoded
    text = {"input_ids": given["input_ids"][:, :3], "attention_mask": torch.ones(1, 3)}
    model(**text)  # still attached, still usable
    session.detach()
    assert torch.equal(model(**given).logits, plain)


def test_a_pruned_cache_cannot_be_continued_by_a_detached_model() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    with foveate.attach(model, STAGED):
        cache = cache_of(model(**given, use_cache=True))
        kept = copy.deepcopy(cache)
    mask = torch.ones(1, given["input_ids"].shape[1] + 1, dtype=torch.long)
    with pytest.raises(foveate.AttachError, match="attach a pruner again"):
        model(input_ids=torch.tensor([[5]]), **cached(model, cache), attention_mask=mask)
    with foveate.attach(model, "random"):  # any pruner will do: the cache knows what it holds
        model(input_ids=torch.tensor([[5]]), **cached(model, kept), attention_mask=mask)


def test_bare_models_and_names_and_parameters() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    with foveate.attach(model.model, "random", keep=3, seed=2) as session:
        model.model(**given)
        assert session.trace.parameters == {"keep": 3, "seed": 2, "shuffle": False, "layer": None}
        assert session.trace.tokens_per_layer == [3] * 4


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    models = [tiny("llava", seed=1), tiny("qwen2_5_vl", seed=2)]
    given = [scene_inputs("llava", "padded"), scene_inputs("qwen2_5_vl", "padded")]
    sessions = [foveate.attach(model, STAGED) for model in models]
    expected = [model.generate(**g, **GREEDY) for model, g in zip(models, given)]
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[i].append(models[i].generate(**given[i], **GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for session in sessions:
        session.detach()
    for i in range(2):
        assert len(results[i]) == 5
        assert all(torch.equal(out, expected[i]) for out in results[i])


def test_a_dropped_model_and_its_session_are_freed() -> None:
    model = tiny("llava")
    session = foveate.attach(model, STAGED)
    model(**scene_inputs("llava", "single"))
    gone = weakref.ref(model), weakref.ref(session)
    del model, session
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


# ------------------------------------------------------------------------------------------------------------- trace


def test_the_trace_says_what_happened() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "several")
    with foveate.attach(model, foveate.Then(foveate.AvgPool(keep=4), foveate.FastV(k=2, keep=0.5))) as session:
        model.generate(**given, **GREEDY)
        trace = session.trace
    assert [image.grid for image in trace.images] == [(4, 4), (4, 4)]
    assert trace.tokens_per_layer == [8, 8, 4, 4]
    image = trace.images[1]
    assert len(image.kept_at(0)) == 4
    assert len(image.kept) == 2
    assert set(image.kept.tolist()) < set(image.kept_at(0).tolist())
    assert image.owner.shape == (16,)
    assert set(image.owner.tolist()) == set(image.kept_at(0).tolist())
    assert image.stages[1].scores.isfinite().sum() == 4  # FastV ranked the four that were left
    assert set(trace.seconds) == {"encoder", "llm_input", "llm_layer(2)"}
    assert all(seconds > 0 for seconds in trace.seconds.values())
    assert "8 from layer 0" not in str(trace)
    assert "4 from layer 0, 2 from layer 2" in str(trace)


def test_random_choice_follows_sample_ids_not_batches() -> None:
    model = tiny("llava")
    samples = [[2, picture("llava", 1), 3], [4, picture("llava", 2), 3]]
    with foveate.attach(model, "random", keep=5) as session:
        model(**inputs("llava", samples))
        together = [image.kept for image in session.trace.images]
        session.sample_ids = [1]
        model(**inputs("llava", samples[1:]))
        alone = session.trace.images[0].kept
        assert torch.equal(alone, together[1])
        assert not torch.equal(*together)
        session.sample_ids = [1, 2, 3]
        with pytest.raises(foveate.ParameterError, match="3 images"):
            model(**inputs("llava", samples))


def test_pictures_and_videos_are_traced_in_prompt_order() -> None:
    family = "qwen2_5_vl"
    model = tiny(family)
    given = inputs(family, [[3, picture(family, 1, (2, 2, 2)), 4, picture(family, 2, (2, 3)), 5]])
    with foveate.attach(model, "random", keep=0.5) as session:
        model(**given)
    assert [(image.kind, image.layout.size) for image in session.trace.images] == [("video", 8), ("image", 6)]


def test_random_choice_inside_the_decoder_differs_between_images() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "several")
    seen: list[tuple[int, ...]] = []

    class Watch(TopNorm):
        def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
            def select(tokens: Tokens) -> Selection:
                seen.append(tokens.sample_ids)
                return Selection(torch.arange(4).expand(len(tokens.embeds), -1))

            return (BeforeLayer(select, layer=1),)

    with foveate.attach(model, Watch()) as session:
        model(**given)
        session.sample_ids = [7, 9]
        model(**given)
    assert seen == [(0, 1), (7, 9)]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_budget_beyond_the_picture_keeps_all_and_says_so_once() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    plain = model(**given).logits
    with foveate.attach(model, "random", keep=1000), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        assert torch.equal(model(**given).logits, plain)
        model(**given)
    assert len([w for w in seen if "exceeds the 16 visual tokens" in str(w.message)]) == 1


def test_unknown_names_suggest_the_nearest() -> None:
    model = tiny("llava")
    with pytest.raises(foveate.UnknownNameError, match="did you mean 'hiprune'"):
        foveate.attach(model, "hipprune")
    with pytest.raises(foveate.UnknownNameError, match="did you mean 'alpha'"):
        foveate.attach(model, "hiprune", alhpa=0.2)


def test_missing_signals_name_the_tower_and_what_would_work() -> None:
    model = tiny("qwen2_5_vl")
    with pytest.raises(foveate.MissingSignalError, match=r"class token.*Qwen2_5_Vision.*work here: .*fopru"):
        foveate.attach(model, "hiprune", query_rows="cls")
    foveate.attach(model, "hiprune").detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_pixels_are_refused_and_the_model_goes_on(family: str) -> None:
    model, given = tiny(family), scene_inputs(family, "single")
    with foveate.attach(model, STAGED):
        good = model(**given).logits
        bad = dict(given, pixel_values=given["pixel_values"].clone())
        bad["pixel_values"].view(-1)[0] = torch.nan
        with pytest.raises(foveate.InputError, match="NaN"):
            model(**bad)
        assert torch.equal(model(**given).logits, good)


def test_calls_that_cannot_be_pruned_are_refused() -> None:
    model, given = tiny("llava"), scene_inputs("llava", "single")
    length = given["input_ids"].shape[1]
    with foveate.attach(model, STAGED):
        good = model(**given).logits
        with pytest.raises(foveate.InputError, match="2-D"):
            model(**{**given, "attention_mask": torch.zeros(1, 1, length, length)})
        with pytest.raises(foveate.InputError, match="static"):
            model.generate(**given, **GREEDY, cache_implementation="static")
        if compat.installed() >= (5, 23):  # before, transformers itself loses the picture in chunks
            with pytest.raises(foveate.InputError, match="chunked prefill"):
                model.generate(**given, **GREEDY, prefill_chunk_size=8)
        cache = cache_of(model(**given, use_cache=True))
        cropped = cache_of(model(**given, use_cache=True))
        type(cropped).crop(cropped, -2)
        with pytest.raises(foveate.InputError, match="cropped or reset"):
            model(input_ids=torch.tensor([[5]]), **cached(model, cropped))
        with pytest.raises(foveate.InputError, match="unpruned sequence"):
            model(input_ids=torch.tensor([[5]]), **cached(model, cache), attention_mask=torch.ones(1, 4))
        assert cache.get_seq_length() == length  # a refused call leaves the cache as it was
        assert torch.equal(model(**given).logits, good)


def test_sliding_window_decoders_are_refused() -> None:
    model = tiny("llava_onevision")
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(foveate.UnsupportedModelError, match="sliding"):
        foveate.attach(model, "random")
