"""What pruning means, on the original LLaVA package: the statements of tests/test_oracles.py, and its own ways in.

Runs under the project's transformers, and by ``make test-llava`` under the one that the package was written for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import foveate
from foveate.adapters.families.llava_original import RenamedCache
from foveate.adapters.session import attached_to
from foveate.pruners.core import AtEntry, EncoderFeatures, ModelInfo, PatchPixels, Pruner, Selection, Stage, Tokens
from foveate.pruners.core.merging import Merger
from tests.pruners.synthetic import TopNorm

package = pytest.importorskip(
    "llava.model.language_model.llava_llama", reason="llava-torch is not installed (pip install --no-deps llava-torch)"
)

# what the package's own forward, without foveate, makes transformers say
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
OLD = transformers.__version__.startswith("4.")
IMAGE, IGNORE, PAD, EOS, VOCAB = -200, -100, 0, 99, 100
SIDE, PATCH, VIEW = 32, 8, 16  # pixels, pixels, tokens of one view
TOLERANCE = 1e-5
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96]]
GREEDY = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
ATTENTION = ("sdpa", "eager")
FLAT, ANYRES = {}, {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
LAYOUTS = {
    "flat": FLAT,
    "unpad": ANYRES,
    "spatial": {**ANYRES, "mm_patch_merge_type": "spatial"},
    "views": {**ANYRES, "mm_patch_merge_type": "flat"},
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random vision tower and its processor."""
    path = tmp_path_factory.mktemp("tower")
    torch.manual_seed(1)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    transformers.CLIPVisionModel(config).save_pretrained(path)
    square = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(path)
    return path


@pytest.fixture
def tiny(tower: Path) -> Any:
    """Makes random models, with weights large enough that attention is not flat."""

    def make(attention: str = "sdpa", **config: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        made = package.LlavaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, pad_token_id=PAD, bos_token_id=1, eos_token_id=EOS,
            mm_vision_tower=str(tower), mm_hidden_size=32, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
            mm_vision_select_feature="patch", tokenizer_padding_side="left", image_grid_pinpoints=PINPOINTS, **config,
        )  # fmt: skip
        made._attn_implementation = attention
        model = package.LlavaLlamaForCausalLM(made).eval()
        model.get_vision_tower().load_model()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0 if "norm" not in name else 1.0)
        if hasattr(model.model, "image_newline"):
            model.model.image_newline.normal_()
        model.lm_head.weight[90:] = 0  # greedy decoding stays clear of special tokens
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = EOS
        assert model.config._attn_implementation == attention
        return model

    return make


def prompts(model: torch.nn.Module, samples: list[list[int | tuple[int, int]]], seed: int = 0) -> dict[str, Any]:
    """Arguments of a call. A sample is a list of pictures' ``(width, height)`` and numbers of random text tokens."""
    g = torch.Generator().manual_seed(seed)
    rows, images, sizes = [], [], []
    for sample in samples:
        ids: list[int] = []
        for part in sample:
            if isinstance(part, int):
                ids += torch.randint(3, 80, (part,), generator=g).tolist()
            else:
                ids.append(IMAGE)
                images.append(torch.randn(_views(model, part), 3, SIDE, SIDE, generator=g))
                sizes.append(part)
        rows.append(ids)
    longest = max(map(len, rows))
    made = {
        "input_ids": torch.tensor([[PAD] * (longest - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]),
    }
    if not images:
        return made
    if getattr(model.config, "image_aspect_ratio", None) == "anyres":
        return {**made, "images": images, "image_sizes": sizes}
    return {**made, "images": torch.cat(images)}


def _views(model: torch.nn.Module, size: tuple[int, int]) -> int:
    if getattr(model.config, "image_aspect_ratio", None) != "anyres":
        return 1
    across, down = package_function("get_anyres_image_grid_shape")(size, PINPOINTS, SIDE)
    return 1 + across * down


def package_function(name: str) -> Any:
    from llava.model import llava_arch

    return getattr(llava_arch, name)


def generate(model: torch.nn.Module, given: dict[str, Any], **options: Any) -> Tensor:
    """The new tokens; transformers 4 puts a start token in front of them.

    From transformers 5.24 on the package's model cannot generate by itself; the unpruned one is lent the same help.
    """
    names = RenamedCache(model) if attached_to(model) is None else None
    try:
        new = model.generate(given["input_ids"], **{k: v for k, v in given.items() if k != "input_ids"}, **options)
    finally:
        if names is not None:
            names.remove()
    return new[:, -options["max_new_tokens"] :]


@dataclass
class Spliced:
    """What the package's own method makes of a prompt; masks and positions are ``(B, L)``."""

    embeds: Tensor
    attended: Tensor
    positions: Tensor
    visual: Tensor


def splice(model: torch.nn.Module, given: dict[str, Any]) -> Spliced:
    ids = given["input_ids"]
    _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        ids, torch.zeros_like(ids), given["attention_mask"], None, ids, given["images"], given.get("image_sizes")
    )
    return Spliced(embeds, mask.bool(), positions, (labels == IGNORE) & mask.bool())


STAGED = TopNorm(at_input=0.6, at_layer=((1, 0.7), (3, 0.5)))
METHODS = {
    "entry": TopNorm(at_input=0.4),
    "layers": TopNorm(at_input=0.8, at_layer=((1, 0.7), (3, 0.5))),
    "fopru": foveate.FoPru(keep=0.4),
    "hiprune": foveate.HiPrune(keep=0.4),
    "fastv": foveate.FastV(keep=0.4),
    "transprune": foveate.TransPrune(ratios=(0.7, 0.5, 0.3), prune_layers=(1, 2, 3), accumulate_layers=(1, 2, 3)),
    "random": foveate.Random(keep=0.5),
    "grid": foveate.Grid(keep=0.25),
}
SCENES = {
    "single": [[4, (40, 60), 6]],
    "padded": [[2, (60, 40), 4], [5, (30, 90), 9]],
    "several": [[3, (40, 60), 4, (60, 30), 5], [6, (60, 60), 2, (31, 95), 3]],
}


def dropped(spliced: Spliced, trace: foveate.Trace, depth: int, newlines: str = "rows") -> list[Tensor]:
    """Per decoder layer ``(B, L)`` bool: picture places that the trace says are gone.

    ``newlines``: each goes with its row, or all of them (``"drop"``).
    """
    gone = []
    for layer in range(depth):
        here = torch.zeros_like(spliced.visual)
        for row in range(len(here)):
            places, start = spliced.visual[row].nonzero()[:, 0], 0
            for image in (i for i in trace.images if i.sample == row):
                mine = places[start : start + image.layout.length]
                start += image.layout.length
                kept = image.kept_at(layer)
                stays = torch.zeros(len(mine), dtype=torch.bool)
                stays[image.layout.places()[kept]] = True
                for newline in image.layout.newlines:
                    row_stays = bool(((kept >= newline.first) & (kept < newline.last)).any())
                    stays[newline.place] = row_stays and newlines == "rows"
                here[row, mine[~stays]] = True
            assert start == len(places), "the trace speaks of every picture place"
        gone.append(here)
    return gone


def masked_logits(model: torch.nn.Module, spliced: Spliced, gone: list[Tensor]) -> Tensor:
    """The model on the whole prompt, with the columns ``gone[i]`` masked out in layer i."""
    length = spliced.embeds.shape[1]
    causal = torch.ones(length, length).tril().bool()
    handles = []
    for i, layer in enumerate(model.model.layers):
        grown = torch.nn.functional.pad(gone[i], (0, length - gone[i].shape[1]))
        seen = causal & (spliced.attended & ~grown)[:, None, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

        def substitute(module: Any, args: Any, kwargs: Any, mask: Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        handles.append(layer.register_forward_pre_hook(substitute, with_kwargs=True))
    try:
        return model(inputs_embeds=spliced.embeds, position_ids=spliced.positions, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def greedy_by_masking(model: torch.nn.Module, spliced: Spliced, gone: list[Tensor], steps: int) -> tuple[Tensor, float]:
    """Greedy tokens ``(B, steps)`` without a cache, and by how much they won."""
    tokens, margin = [], float("inf")
    for _ in range(steps):
        logits = masked_logits(model, spliced, gone)[:, -1]
        best = logits.topk(2).values
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
        tokens.append(logits.argmax(-1, keepdim=True))
        spliced = Spliced(
            torch.cat([spliced.embeds, model.get_input_embeddings()(tokens[-1])], 1),
            torch.nn.functional.pad(spliced.attended, (0, 1), value=True),
            torch.cat([spliced.positions, spliced.positions[:, -1:] + 1], 1),
            torch.nn.functional.pad(spliced.visual, (0, 1)),
        )
    return torch.cat(tokens, 1), margin


# everything where the package is at home; elsewhere what its own code could change
CASES = [
    (attention, method, layout, scene)
    for attention in ATTENTION
    for method in METHODS
    for layout in ("flat", "unpad")
    for scene in SCENES
    if (method, layout) != ("transprune", "unpad")  # newlines compete with tokens, and the trace speaks of tokens
    and (OLD or (scene == "several" and (attention == "sdpa" or method == "layers")))
]


@pytest.mark.parametrize(("attention", "method", "layout", "scene"), CASES)
def test_dropping_equals_masking(tiny: Any, attention: str, method: str, layout: str, scene: str) -> None:
    """Logits of one call, and nine greedy tokens with caches of different length per layer."""
    model = tiny(attention, **LAYOUTS[layout])
    given = prompts(model, SCENES[scene])
    spliced = splice(model, given)
    with foveate.attach(model, METHODS[method], positions="keep") as session:
        pruned = model(**given, position_ids=torch.zeros_like(given["input_ids"])).logits
        trace = session.trace
        if method == "random":
            session.sample_ids = range(len(trace.images))
        tokens = generate(model, given, **GREEDY)
    gone = dropped(spliced, trace, 4, "drop" if method == "hiprune" else "rows")
    assert gone[-1].any(), "the case prunes nothing"
    reference = masked_logits(model, spliced, gone)
    alive = spliced.attended & ~gone[-1]
    assert reference[alive].abs().max() > 0.5, "the case is numerically trivial"
    assert (pruned - reference)[alive].abs().max() < TOLERANCE
    expected, margin = greedy_by_masking(model, spliced, gone, 9)
    assert margin > 2 * TOLERANCE, "greedy decoding is ambiguous in this case"
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("layout", ["spatial", "views"])
def test_other_ways_to_lay_crops_out(tiny: Any, layout: str) -> None:
    """Crops without newlines: by rows of the whole picture, or one after the other."""
    model = tiny(**LAYOUTS[layout])
    given = prompts(model, SCENES["several"])
    spliced = splice(model, given)
    with foveate.attach(model, STAGED, positions="keep") as session:
        pruned = model(**given, position_ids=torch.zeros_like(given["input_ids"])).logits
    gone = dropped(spliced, session.trace, 4)
    alive = spliced.attended & ~gone[-1]
    assert (pruned - masked_logits(model, spliced, gone))[alive].abs().max() < TOLERANCE


@dataclass(frozen=True)
class Witness(Pruner):
    """Keeps everything and notes what it was shown."""

    name = "witness"

    def stages(self, model: ModelInfo) -> tuple[Stage, ...]:
        SEEN.clear()
        read = {"features": EncoderFeatures(model.feature_layer), "pixels": PatchPixels(0)}
        return (AtEntry(self.select, read, reads_text=True),)

    @staticmethod
    def select(tokens: Tokens, features: Tensor, pixels: Tensor) -> Selection:
        for i, number in enumerate(tokens.sample_ids):
            SEEN[number] = (tokens, i, tokens.project(features)[i], pixels[i])
        return Selection(torch.arange(tokens.count).expand(len(features), -1))


SEEN: dict[int, tuple[Tokens, int, Tensor, Tensor]] = {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_methods_see_what_stands_in_the_prompt(tiny: Any, layout: str) -> None:
    """Embeddings, tower signals, pixels and the question, in the order of the prompt's places."""
    model = tiny(**LAYOUTS[layout])
    samples = [[2, (60, 40), 3, (31, 95), 4], [7], [5, (90, 30), 9]]  # the row of text uses up a picture
    given = prompts(model, [*samples[:1], [7, (40, 40)], samples[2]])
    given["input_ids"][1][given["input_ids"][1] == IMAGE] = 8
    spliced = splice(model, given)
    with foveate.attach(model, Witness()) as session:
        model(**given)
    assert [image.sample for image in session.trace.images] == [0, 0, 2]
    start = {0: 0, 2: 0}
    for number, image in enumerate(session.trace.images):
        tokens, i, projected, pixels = SEEN[number]
        places = spliced.visual[image.sample].nonzero()[:, 0][start[image.sample] :][: image.layout.length]
        start[image.sample] += image.layout.length
        here = spliced.embeds[image.sample, places]
        own = image.layout.places()
        assert torch.equal(tokens.embeds[i], here[own])
        assert (projected - here[own]).abs().max() < TOLERANCE
        newlines = [n.place for n in image.layout.newlines]
        assert bool(newlines) == (layout == "unpad")
        assert all(torch.equal(here[p], model.model.image_newline) for p in newlines)
        behind = given["input_ids"][image.sample].tolist()
        behind = [t for t in behind[behind.index(IMAGE) :] if t != IMAGE]
        assert tokens.instruction_ids[i][tokens.instruction_mask[i]].tolist() == behind
        raw = pixels * torch.tensor(OPENAI_STD).view(3, 1, 1, 1)
        assert raw.shape == (image.layout.size, 3, 1, PATCH, PATCH)
    first = given["images"][0].view(-1, 3, SIDE, SIDE)[0]
    std, mean = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_STD, OPENAI_MEAN))
    assert ((SEEN[0][3][1, :, 0] - mean) / std - first[:, :PATCH, PATCH : 2 * PATCH]).abs().max() < TOLERANCE


OPENAI_MEAN, OPENAI_STD = transformers.CLIPImageProcessor().image_mean, transformers.CLIPImageProcessor().image_std


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("layout", ["flat", "unpad"])
@pytest.mark.parametrize("scene", SCENES)
def test_keeping_everything_and_detaching_are_bit_equal(tiny: Any, attention: str, layout: str, scene: str) -> None:
    model = tiny(attention, **LAYOUTS[layout])
    given = prompts(model, SCENES[scene])
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, IGNORE)
    before = model(**given, labels=labels)
    tokens = generate(model, given, **GREEDY)
    state = set(vars(model)), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with foveate.attach(model, TopNorm(at_input=1.0, at_layer=((2, 1.0),))):
        same = model(**given, labels=labels)
        assert torch.equal(same.logits, before.logits)
        assert torch.equal(same.loss, before.loss)
        assert torch.equal(generate(model, given, **GREEDY), tokens)
    with foveate.attach(model, TopNorm(at_input=0.3, at_layer=((2, 0.5),))) as session:
        assert not torch.equal(model(**given).logits, before.logits)
        with session.paused():
            assert torch.equal(model(**given).logits, before.logits)
    after = model(**given, labels=labels)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(generate(model, given, **GREEDY), tokens)
    assert state == (set(vars(model)), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("layout", ["flat", "unpad"])
@pytest.mark.parametrize("method", ["layers", "fopru", "hiprune", "fastv", "transprune"])
def test_batched_generation_equals_singles(tiny: Any, method: str, layout: str, positions: str) -> None:
    """Rows of different length, padded on the left, with different numbers of tokens kept."""
    model = tiny(**LAYOUTS[layout])
    samples = SCENES["several"]
    batch = prompts(model, samples)
    with foveate.attach(model, METHODS[method], positions=positions):
        together = generate(model, batch, **GREEDY)
        for row in range(len(samples)):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            alone = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            alone["images"] = batch["images"][2 * row : 2 * row + 2]
            if "image_sizes" in batch:
                alone["image_sizes"] = batch["image_sizes"][2 * row : 2 * row + 2]
            assert torch.equal(generate(model, alone, **GREEDY), together[row : row + 1])


@pytest.mark.parametrize("attention", ATTENTION)
def test_compact_positions_equal_the_shortened_sequence(tiny: Any, attention: str) -> None:
    model = tiny(attention)
    given = prompts(model, SCENES["single"])
    spliced = splice(model, given)
    with foveate.attach(model, TopNorm(at_input=0.4), positions="compact") as session:
        pruned = model(**given).logits
        tokens = generate(model, given, **GREEDY)[0]
    kept = ~dropped(spliced, session.trace, 4)[0]
    short = spliced.embeds[kept][None]
    assert (model(inputs_embeds=short).logits[0] - pruned[kept]).abs().max() < TOLERANCE
    for token in tokens:
        assert model(inputs_embeds=short).logits[0, -1].argmax() == token
        short = torch.cat([short, model.get_input_embeddings()(token.view(1, 1))], 1)


def test_labels_meet_what_the_decoder_saw(tiny: Any) -> None:
    """The loss of a batch is that of the masked model on the text, in the caller's own labels."""
    model = tiny()
    given = prompts(model, SCENES["padded"])
    labels = given["input_ids"].clone()
    for row in labels:
        row[: row.tolist().index(IMAGE) + 2] = IGNORE
    with foveate.attach(model, STAGED, positions="keep") as session:
        loss = model(**given, labels=labels, position_ids=torch.zeros_like(labels)).loss
    spliced = splice(model, given)
    logits = masked_logits(model, spliced, dropped(spliced, session.trace, 4))
    ids = given["input_ids"]
    mine = model.prepare_inputs_labels_for_multimodal(
        ids, None, given["attention_mask"], None, labels, given["images"]
    )[5]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten())
    assert (loss - expected).abs() < TOLERANCE


@pytest.mark.skipif(
    not OLD,
    reason="transformers 5 then records the package's tower twice, which changes its features for good, unattached too",
)
def test_hidden_states_keep_the_original_length(tiny: Any) -> None:
    model = tiny()
    given = prompts(model, SCENES["padded"])
    spliced = splice(model, given)
    plain = model(**given, output_hidden_states=True).hidden_states
    with foveate.attach(model, TopNorm(at_layer=((2, 0.5),)), positions="keep"):
        pruned = model(**given, output_hidden_states=True).hidden_states
    assert [x.shape for x in pruned] == [x.shape for x in plain]
    for i in range(3):  # nothing is gone in front of layer 2
        assert (pruned[i] - plain[i])[spliced.attended].abs().max() < TOLERANCE, i
    assert not torch.allclose(pruned[3][spliced.attended], plain[3][spliced.attended], atol=1e-3)


def test_beams_see_the_same_picture(tiny: Any) -> None:
    """The score that beam search reports is that of its tokens under the masked model."""
    model = tiny()
    given = prompts(model, SCENES["padded"])
    spliced = splice(model, given)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "length_penalty": 0.0}
    ids, rest = given["input_ids"], {k: v for k, v in given.items() if k != "input_ids"}
    with foveate.attach(model, STAGED, positions="keep") as session:
        out = model.generate(ids, **rest, **options, return_dict_in_generate=True, output_scores=True)
    for image in session.trace.images:
        image.sample //= options["num_beams"]
    gone = dropped(spliced, session.trace, 4)
    score, tokens = torch.zeros(2), out.sequences[:, -4:]
    for i in range(4):
        score += masked_logits(model, spliced, gone)[:, -1].log_softmax(-1).gather(1, tokens[:, i : i + 1])[:, 0]
        spliced = Spliced(
            torch.cat([spliced.embeds, model.get_input_embeddings()(tokens[:, i : i + 1])], 1),
            torch.nn.functional.pad(spliced.attended, (0, 1), value=True),
            torch.cat([spliced.positions, spliced.positions[:, -1:] + 1], 1),
            torch.nn.functional.pad(spliced.visual, (0, 1)),
        )
    assert (out.sequences_scores - score).abs().max() < 1e-4


def test_an_attached_model_says_nothing_of_old_names(tiny: Any) -> None:
    """Statement: a user with a pruner attached is not told what transformers is about to take from the package."""
    model = tiny()
    given = prompts(model, SCENES["padded"])
    with foveate.attach(model, STAGED), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        logits = model(**given).logits
        output = model(**given, use_cache=True)
        generate(model, given, **GREEDY)
    assert torch.equal(output.logits, logits)
    assert not {"forward", "prepare_inputs_for_generation"} & vars(model).keys()


def test_text_alone_is_left_as_it_is(tiny: Any) -> None:
    model = tiny()
    given = prompts(model, [[9], [6]])
    logits, tokens = model(**given).logits, generate(model, given, **GREEDY)
    with foveate.attach(model, STAGED) as session:
        assert torch.equal(model(**given).logits, logits)
        assert torch.equal(generate(model, given, **GREEDY), tokens)
        assert session.trace is None


def test_padding_on_the_right_is_pruned_rightly_and_warned_of(tiny: Any) -> None:
    """One call is right; generation goes on behind the padding, where the package itself goes wrong."""
    model = tiny()
    given = prompts(model, SCENES["padded"])
    spliced = splice(model, given)
    with foveate.attach(model, STAGED, positions="keep") as session:
        left = model(**given, position_ids=torch.zeros_like(given["input_ids"])).logits
        alive = spliced.attended & ~dropped(spliced, session.trace, 4)[-1]
        model.config.tokenizer_padding_side = "right"
        with pytest.warns(UserWarning, match="tokenizer_padding_side"):
            right = model(**given, position_ids=torch.zeros_like(given["input_ids"])).logits
        spliced = splice(model, given)
        again = spliced.attended & ~dropped(spliced, session.trace, 4)[-1]
    assert (left[alive] - right[again]).abs().max() < TOLERANCE


def test_a_prompt_that_does_not_arrive_whole_is_refused(tiny: Any) -> None:
    model = tiny(tokenizer_model_max_length=14)
    given = prompts(model, SCENES["single"])
    before = model(**given).logits
    with foveate.attach(model, STAGED) as session:
        with pytest.raises(foveate.FoveateError, match="cut"):
            model(**given)
        with session.paused():
            assert torch.equal(model(**given).logits, before)
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([[IMAGE]])], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        with pytest.raises(foveate.FoveateError, match="2 image tokens"):
            model(**given)
    assert "prepare_inputs_labels_for_multimodal" not in vars(model)


def test_what_is_not_known_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.get_vision_tower().is_loaded = False
    with pytest.raises(foveate.UnsupportedModelError, match="load_model"):
        foveate.attach(model, "fopru")
    model.get_vision_tower().is_loaded = True
    model.get_vision_tower().select_feature = "cls_patch"
    with pytest.raises(foveate.UnsupportedModelError, match="cls_patch"):
        foveate.attach(model, "fopru")
    model.get_vision_tower().select_feature = "patch"
    monkeypatch.setattr("foveate.adapters.compat.installed", lambda: (4, 45))
    with pytest.raises(foveate.UnsupportedModelError, match=r"transformers 4\.45"):
        foveate.attach(model, "fopru")


@pytest.mark.parametrize("name", sorted(foveate.pruners.PRUNERS))
def test_every_method_runs_or_says_why_not(tiny: Any, name: str) -> None:
    model, method = tiny(**ANYRES), foveate.pruners.PRUNERS[name]
    given = prompts(model, SCENES["padded"])
    before = model(**given).logits
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = foveate.attach(model, name, **({"keep": 0.5} if hasattr(method, "keep") else {}))
    except foveate.UnsupportedModelError:
        assert name == "downsample" or (OLD and issubclass(method, Merger))
        return
    with session:
        logits = model(**given).logits
        generate(model, given, **GREEDY)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, before)
    assert torch.equal(model(**given).logits, before)
