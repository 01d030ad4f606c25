"""Merging inside vision models of timm, open_clip and transformers, against the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import foveate
from foveate.adapters import MergeTrace, VitSession, compat
from foveate.adapters.towers.base import tower_for
from foveate.errors import AttachError, UnsupportedModelError
from foveate.pruners.core.merging import BlockTokens

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")

SIDE, PATCH = 32, 8  # 16 patches


def timm_model(name: str = "vit_tiny_patch16_224", **more: Any) -> nn.Module:
    given = {"img_size": SIDE, "patch_size": PATCH, "depth": 3, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
    return timm.create_model(name, **(given | more))


def hf(cls: str, config: str, **more: Any) -> nn.Module:
    given = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return getattr(transformers, cls)(getattr(transformers, config)(**given, **more))


def clip(**vision: Any) -> nn.Module:
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": SIDE, "patch_size": PATCH, "width": 32, "layers": 3, "head_width": 8, **vision},
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    )


# LayerScale well above its usual start, or no branch would show in the output
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": timm_model,
    "deit distilled": lambda: timm_model("deit_tiny_distilled_patch16_224"),
    "dinov2": lambda: timm_model("vit_small_patch14_dinov2", init_values=0.3, patch_size=PATCH),
    "registers": lambda: timm_model("vit_small_patch14_reg4_dinov2", init_values=0.3, patch_size=PATCH),
    "average": lambda: timm_model(global_pool="avg", class_token=False),
    "map": lambda: timm_model(global_pool="map", class_token=False),
    "qk norm": lambda: timm_model(qk_norm=True),
    "post norm": lambda: timm_model(block_fn=timm.models.vision_transformer.ResPostBlock),
    "eva": lambda: timm_model("eva02_tiny_patch14_224", patch_size=PATCH),
    "dinov3": lambda: timm_model("vit_small_patch16_dinov3", init_values=0.3),
    "rope by head": lambda: timm_model("vit_small_patch16_rope_mixed_224", init_values=0.3),
    "open_clip": clip,
    "open_clip average": lambda: clip(pool_type="avg", ls_init_value=0.3),
    "open_clip pooler": lambda: clip(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=5),
    "hf clip": lambda: hf("CLIPVisionModel", "CLIPVisionConfig"),
    "hf siglip": lambda: hf("SiglipVisionModel", "SiglipVisionConfig"),
    "hf vit": lambda: hf("ViTModel", "ViTConfig"),
    "hf dinov2": lambda: hf("Dinov2Model", "Dinov2Config", layerscale_value=0.3),
    "hf dinov2 registers": lambda: hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=4),
}
ROTARY = ("eva", "dinov3", "rope by head")  # positions tell equal patches apart
POOLING = ("average", "map", "open_clip average", "open_clip pooler", "hf siglip")
MERGERS = [foveate.ToMe(r=3), foveate.PiToMe(ratio=0.8), foveate.PiToMe(ratio=0.8, order="llava", metric="keys")]


def built(name: str) -> nn.Module:
    if name.startswith("hf dinov2") and compat.installed() < (5, 18):
        pytest.skip("DINOv2 of transformers before 5.18 takes no mask; it is refused")
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # so that attention is not flat
    return model.requires_grad_(False)


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What users read: logits, image embeddings, or the pooled output."""
    if hasattr(model, "encode_image"):
        return model.encode_image(x)
    output = model(x)
    if isinstance(output, Tensor):
        return output
    return output.last_hidden_state[:, 0] if output.pooler_output is None else output.pooler_output


@pytest.mark.parametrize("name", MODELS)
def test_keeping_everything_and_detaching_change_no_bit(name: str) -> None:
    """Statement: r = 0 and ratio = 1 are bit-equal to the bare model, and so is the model after detaching a merger."""
    model, x = built(name), pictures()
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    plain = features(model, x)
    for merger in (foveate.ToMe(r=0), foveate.PiToMe(ratio=1.0)):
        with foveate.attach(model, merger) as session:
            assert torch.equal(features(model, x), plain)
            assert len(set(session.trace.counts)) == 1
    for merger in MERGERS:
        with foveate.attach(model, merger):
            assert not torch.equal(features(model, x), plain), "it must act"
        assert torch.equal(features(model, x), plain)
    after = {key: dict(vars(module)) for key, module in model.named_modules()}
    for key in before:
        assert before[key].keys() == after[key].keys(), f"{key}: nothing is left on the instance"


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_announced_and_every_patch_has_an_owner(name: str) -> None:
    """Statement: every block has the announced rows, sizes add up to all rows, and unmerging reaches every patch."""
    model, x = built(name), pictures()
    for merger in MERGERS:
        with foveate.attach(model, merger) as session:
            features(model, x)
            assert isinstance(session, VitSession)
            trace: MergeTrace = session.trace
            assert tuple(trace.counts) == merger.counts(16, session.info)
            prefix, n = trace.prefix, 16 + trace.prefix
            assert torch.equal(session.sizes.sum(dim=1), torch.full((3,), float(n)))
            assert torch.equal(session.sizes[:, :prefix], torch.ones(3, prefix))
            kept = trace.counts[-1] - prefix
            assert trace.kept.shape == (3, kept)
            assert torch.equal(trace.owner.gather(1, trace.kept), trace.kept), "survivors speak for themselves"
            sizes = torch.stack([row.bincount(minlength=16) for row in trace.owner])
            assert torch.equal(
                sizes.gather(1, trace.kept).sort().values.float(), session.sizes[:, prefix:].sort().values
            )
            rows = torch.arange(trace.counts[-1]).float().expand(3, -1)[..., None]
            assert session.unmerge(rows).shape == (3, n, 1)
            assert session.unmerge(rows[:, prefix:]).shape == (3, 16, 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_its_pictures_give_alone(name: str) -> None:
    """Statement: no picture's features depend on the others of its batch."""
    model, x = built(name), pictures()
    for merger in MERGERS:
        with foveate.attach(model, merger):
            together = features(model, x)
            for b in range(3):
                torch.testing.assert_close(features(model, x[b : b + 1]), together[b : b + 1], atol=2e-5, rtol=1e-4)


@pytest.fixture(params=[name for name in MODELS if name not in ROTARY])
def unplaced(request: pytest.FixtureRequest) -> nn.Module:
    """A model to which patches of one colour are equal wherever they are."""
    model = built(request.param)
    for key, parameter in model.named_parameters():
        if "pos_embed" in key or ("position" in key and "text" not in key):
            parameter.zero_()
    return model


def two_colours() -> tuple[Tensor, Tensor]:
    """Two pictures whose patches have one of two colours each, more of one than of the other, and ``(2, 16)`` which."""
    which = torch.zeros(2, 16, dtype=torch.long)
    which[0, [0, 1, 6, 7, 11]] = 1
    which[1, [2, 5, 8, 10, 13, 15]] = 1
    palette = torch.tensor([[0.3, -0.8, 0.5], [-0.9, 0.4, 0.1]])
    cells = palette[which].transpose(1, 2).unflatten(2, (SIDE // PATCH, SIDE // PATCH))
    return cells.repeat_interleave(PATCH, dim=2).repeat_interleave(PATCH, dim=3), which


def test_equal_patches_merge_without_loss(unplaced: nn.Module) -> None:
    """Statement: with size weighting and proportional attention, merging tokens that are alike changes nothing.

    That needs LayerScale, key bias, weighted mean and weighted pooling to be right all at once. The colours differ in
    how many of their patches merge, so whatever counts rows instead of patches shows.
    """
    x, which = two_colours()
    plain = features(unplaced, x)
    for merger in (foveate.ToMe(r=3), foveate.PiToMe(ratio=0.8)):
        with foveate.attach(unplaced, merger) as session:
            found = features(unplaced, x)
            trace = session.trace
            assert trace.counts[-1] < trace.counts[0]
            assert torch.equal(which.gather(1, trace.owner), which), "like merges with like"
            torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)
        with foveate.attach(unplaced, replace(merger, prop_attn=False)):
            assert (features(unplaced, x) - plain).abs().max() > 1e-4, "the statement could not fail otherwise"


@pytest.mark.parametrize("unplaced", POOLING, indirect=True)
def test_pooling_counts_patches_not_rows(unplaced: nn.Module) -> None:
    """Statement: average and attention pooling weigh every row by its patches.

    Only the last block merges, behind its attention, so that nothing but the pooling sees sizes.
    """
    x, which = two_colours()
    plain = features(unplaced, x)
    with foveate.attach(unplaced, foveate.ToMe(r=(0, 0, 5))) as session:
        torch.testing.assert_close(features(unplaced, x), plain, atol=2e-5, rtol=1e-4)
        assert torch.equal(which.gather(1, session.trace.owner), which), "like merges with like"

        def forget(*_: Any) -> None:
            session._merger.sizes = session._merger._bias = None

        handle = tower_for(unplaced).blocks[-1].register_forward_hook(forget)
        assert (features(unplaced, x) - plain).abs().max() > 1e-4, "the statement could not fail otherwise"
        handle.remove()


@pytest.mark.parametrize("name", ["vit", "registers", *ROTARY])
def test_dropping_rows_equals_masking_them(name: str) -> None:
    """Statement: rows that leave a block without merging are missing from later attention, and nothing else changes.

    The bare model, with those rows masked as keys from the next block on, has its whole rotary table; survivors must be
    at their own places in the gathered one.
    """
    model, x = built(name), pictures()
    rows: list[Tensor] = []
    last = model.blocks[-1].register_forward_hook(lambda module, args, output: rows.append(output))
    dropper = foveate.PiToMe(ratio=0.8, order="plain", weighting="prune", prop_attn=False)
    with foveate.attach(model, dropper) as session:
        model(x)
        trace = session.trace
    n, alive = trace.counts[0], [trace.origins(i) for i in range(len(model.blocks))]
    assert all((a[:, trace.prefix :].diff(dim=1) < 0).any() for a in alive[1:]), "rows must leave their order"
    for block, origins in zip(model.blocks, alive, strict=True):
        mask = torch.zeros(3, n, dtype=torch.bool).scatter(1, origins, True)[:, None, None]
        block.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attn_mask": mask}), with_kwargs=True
        )
    model(x)
    last.remove()
    pruned, masked = rows
    at = trace.origins()[..., None].expand(-1, -1, masked.shape[-1])
    torch.testing.assert_close(pruned, masked.gather(1, at), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov2", "open_clip", "hf clip"])
def test_low_precision_models_keep_their_type(name: str) -> None:
    """Statement: a bfloat16 model gives finite bfloat16 features, with the announced rows."""
    model, x = built(name).bfloat16(), pictures().bfloat16()
    for merger in MERGERS:
        with foveate.attach(model, merger) as session:
            found = features(model, x)
            assert found.dtype == torch.bfloat16
            assert torch.isfinite(found.float()).all()
            assert tuple(session.trace.counts) == merger.counts(16, session.info)


def paired_by_energy(metric: Tensor, r: int, margin: float) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """PiToMe's protected pairing of patches behind a class token by the paper's formulas in float64: the pictures in
    which float32 can tell all energies and matches apart, and kept rows, sources, and the kept rows that they join.
    ``metric (B, 1 + N, d)``."""
    unit = F.normalize(metric.double()[:, 1:], dim=-1)
    x = unit @ unit.mT - margin
    energy = torch.where(x > 0, x, torch.exp(x) - 1).mean(dim=-1)
    ranking = energy.sort(dim=-1, descending=True)
    clear = -ranking.values.diff(dim=-1).amax(dim=-1) > 3e-7
    order = ranking.indices
    source, target, protected = order[:, 0 : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
    rows = torch.arange(len(unit))[:, None]
    similarity = unit[rows, source] @ unit[rows, target].mT
    match, best = similarity.argmax(dim=-1), similarity.topk(2).values
    clear &= (best[..., 0] - best[..., 1]).amin(dim=-1) > 1e-6
    keep = torch.cat([torch.zeros(len(unit), 1, dtype=torch.long), 1 + protected, 1 + target], dim=1)
    return clear, (keep, 1 + source, 1 + protected.shape[1] + match)


def test_bf16_models_group_by_float32_energies_of_their_keys() -> None:
    """Statement: in each block of a bfloat16 model the groups are those of exact energies of the keys' head mean."""
    torch.manual_seed(0)
    model = timm_model(img_size=128).eval().requires_grad_(False).bfloat16()
    x = torch.randn(6, 3, 128, 128).bfloat16()
    heard: list[Tensor] = []
    handles = [block.attn.k_norm.register_forward_hook(lambda m, a, keys: heard.append(keys)) for block in model.blocks]
    merger = foveate.PiToMe(ratio=0.6, order="plain")
    with foveate.attach(model, merger) as session:
        model(x)
        found = [groups for _, groups in session.trace._groups]
    for handle in handles:
        handle.remove()
    assert len(found) == len(heard) == 3
    for i, (groups, keys) in enumerate(zip(found, heard)):
        r, margin = groups.source.shape[1], 0.75 * (1 - i / 3)
        clear, expected = paired_by_energy(keys.double().mean(dim=1), r, margin)
        assert clear.any(), f"block {i}: no picture to compare by"
        for mine, right in zip((groups.keep, groups.source, groups.target), expected):
            assert torch.equal(mine[clear], right[clear]), f"block {i}"
    rounded = merger.block(0, session.info).select(BlockTokens(x, 1, found[0].source.shape[1]), heard[0].mean(dim=1))
    assert not torch.equal(found[0].source, rounded.source), "a mean over heads in bfloat16 groups otherwise"


@pytest.mark.parametrize(("name", "merger"), [("vit", 0), ("vit", 1), ("dinov3", 1), ("open_clip", 0), ("hf clip", 1)])
def test_attached_models_compile_whole(name: str, merger: int) -> None:
    """Statement: torch.compile makes one graph of the attached model per shape, with the same numbers and trace."""
    torch._dynamo.reset()
    model, x = built(name), pictures()
    with foveate.attach(model, MERGERS[merger]) as session:
        expected, kept, counts = features(model, x), session.trace.kept, list(session.trace.counts)
        # code generation, which takes minutes, is left out
        compiled = torch.compile(partial(features, model), backend="aot_eager", fullgraph=True)
        other = compiled(pictures(seed=1))
        torch.testing.assert_close(compiled(x), expected)
        assert session.trace.counts == counts
        assert torch.equal(session.trace.kept, kept)
        torch.testing.assert_close(other, features(model, pictures(seed=1)))
    torch.testing.assert_close(compiled(x), features(model, x))


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "resnet18", "hiera_tiny_224", "beit_base_patch16_224"]
)
def test_other_architectures_are_refused_by_name(name: str) -> None:
    """Statement: models whose blocks cannot lose rows are refused, and the message names the class."""
    model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        foveate.attach(model, foveate.ToMe())


def test_blocks_that_cannot_be_opened_are_refused_by_name() -> None:
    """Statement: one block of an unknown kind is enough to refuse, with nothing left half attached."""
    model = timm_model(block_fn=timm.models.vision_transformer.ParallelScalingBlock).eval()
    with pytest.raises(UnsupportedModelError, match="ParallelScalingBlock"):
        foveate.attach(model, foveate.ToMe())
    mixed = timm_model().eval()
    mixed.blocks[2] = model.blocks[2]
    with pytest.raises(UnsupportedModelError, match="ParallelScalingBlock"):
        foveate.attach(mixed, foveate.ToMe())
    assert all("forward" not in vars(block) for block in mixed.blocks)


def test_methods_for_decoders_are_refused_on_vision_models() -> None:
    """Statement: a vision model has no decoder, and the message says which methods work."""
    with pytest.raises(UnsupportedModelError, match="pitome, tome"):
        foveate.attach(built("vit"), foveate.DivPrune())


def test_only_one_method_at_a_time() -> None:
    """Statement: a second method is refused while one acts, also when nobody kept the first session."""
    model = built("vit")
    foveate.attach(model, foveate.ToMe(r=2))
    with pytest.raises(AttachError, match="tome"):
        foveate.attach(model, foveate.PiToMe())


def test_grid_shaped_outputs_are_refused_while_merging() -> None:
    """Statement: what lays rows out on the grid cannot run on merged rows, and says what to do."""
    model = built("vit")
    with foveate.attach(model, foveate.ToMe(r=2)), pytest.raises(AttachError, match="unmerge"):
        model.forward_intermediates(pictures())
    model.forward_intermediates(pictures())


def test_averaging_heads_of_transformers_are_refused() -> None:
    """Statement: a head that would average merged tokens as single patches is refused."""
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    )
    with pytest.raises(UnsupportedModelError, match="averages"):
        foveate.attach(transformers.CLIPForImageClassification(config), foveate.ToMe())


def test_the_text_side_is_left_alone() -> None:
    """Statement: in a CLIP model only the image tower is touched, though both towers share their block class."""
    model = built("open_clip")
    with foveate.attach(model, foveate.ToMe(r=3)):
        assert all("forward" not in vars(block) for block in model.transformer.resblocks)
        model.encode_text(torch.randint(1, 20, (2, 8)))


def test_training_reaches_all_weights() -> None:
    """Statement: a merged model can be trained; drop path acts as in the model."""
    model = timm_model(drop_path_rate=0.1, init_values=0.1).train()
    with foveate.attach(model, foveate.ToMe(r=3)):
        model(pictures()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_towers_are_found() -> None:
    """Statement: a model that is no vision model is not taken for one."""
    assert tower_for(nn.Linear(2, 2)) is None
    assert tower_for(built("registers")).prefix == 5
    assert tower_for(built("deit distilled")).prefix == 2
    assert tower_for(built("hf siglip")).prefix == 0
