"""Maps the inputs of a golden case, given by meaning, to calls of the shipped functions.

Recorded attention maps enter the attention operations as scores: with queries ``log P``, keys the identity and scale 1
the operation's softmax gives P back. Nothing here computes what a method computes; parameters that are not understood
raise, inputs that nothing reads are warned of.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel
from transformers.image_processing_utils import select_best_resolution
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llama.modeling_llama import LlamaMLP

from foveate.cuda import (
    core_neurons,
    diverse_subset,
    gather_tokens,
    match_counts,
    merge_tokens,
    neuron_counts,
    received_attention,
    rows_to_columns_attention,
    similarity_energy,
)
from foveate.cuda.merging import merged_sizes, size_bias
from foveate.pruners import (
    CDPruner,
    CoreMatching,
    DivPrune,
    FastV,
    FocusUI,
    FoPru,
    GlobalCom2,
    HiPrune,
    InTower,
    Layout,
    ModelInfo,
    PiToMe,
    PosPad,
    QuoTA,
    Selection,
    ToDRE,
    Tokens,
    ToMe,
    TransPrune,
    View,
    VisionZip,
)
from foveate.pruners.core.allocation import (
    CAPS,
    checked_scores,
    frame_budgets,
    frame_grid,
    frame_weights,
    with_newlines,
)
from foveate.pruners.core.canvas import canvas_of
from foveate.pruners.core.frame_questions import parsed_objects
from foveate.pruners.core.merging import BlockTokens, Groups
from foveate.pruners.core.patch_scorer import PatchScorer, scorer_loss
from foveate.pruners.core.resampling import GRID, pooled, resampled
from foveate.pruners.core.selection import budget, keep_all, ranked
from foveate.pruners.core.signals import ClassAttention, Columns, InstructionAttention, TransitionVariation
from foveate.pruners.core.ui_graph import box_coverage, image_blocks, supervision, ui_graph
from foveate.pruners.corematching import above_knee, knee
from foveate.pruners.globalcom2 import crop_ratios, distinctness, global_map, richness, token_score
from foveate.pruners.hiprune import anchor_count, anchors
from foveate.pruners.pospad import marker_token
from foveate.pruners.todre import attended_pivot, diversification
from foveate.pruners.tome import schedule
from foveate.pruners.transprune import combined_score

# what adapters do, of which some cases recorded the result
from foveate.adapters import MergeTrace, attach, compat  # isort: skip
from foveate.adapters.engine.cache import zero_rows  # isort: skip
from foveate.adapters.engine.prefill import deepstack_levels  # isort: skip
from foveate.adapters.engine.mlp import SparseMLP  # isort: skip
from foveate.adapters.families.anyres import anyres as _anyres  # isort: skip

Case = Mapping[str, Any]
Tensors = dict[str, Tensor]


class UnknownParameter(ValueError):
    """A golden case uses something this file does not know how to map."""


ANY = torch.iinfo(torch.int64).min
"""In an output: the recorded code did something else here on purpose that has no meaning for ours."""


def run_case(method: str, params: Case, inputs: Tensors) -> Tensors:
    """Outputs of one case under the names of its file.

    Raises:
        UnknownParameter: a parameter, or the value of one, that is not understood.
        KeyError: an input is missing.
        AssertionError: the case states something that the shipped code derives otherwise.
    """
    stated, given = Params(method, params), Inputs(inputs)
    outputs = RUNNERS[method](stated, given)
    stated.done()
    if given.unread:
        # the outputs are compared all the same, so a case cannot pass for ignoring what matters
        warnings.warn(f"{method}: inputs that nothing reads: {', '.join(sorted(given.unread))}", stacklevel=2)
    return outputs


class Params:
    """Parameters of a case; every one must be read, or named as a remark, before the case counts as understood."""

    def __init__(self, method: str, values: Case) -> None:
        self.method = method
        self.values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self.values.pop(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.pop(name, default)

    def options(self, *names: str) -> dict[str, Any]:
        """The method parameters among ``names`` that the case sets."""
        return {name: self.values.pop(name) for name in names if name in self.values}

    def drop(self, *remarks: str) -> None:
        """Parameters that say nothing to the shipped code."""
        for name in remarks:
            self.values.pop(name, None)

    def done(self, *remarks: str) -> None:
        """Raise if anything but ``remarks`` is left."""
        self.drop("seed", "note", *remarks)
        if self.values:
            raise UnknownParameter(f"{self.method}: parameters not understood: {', '.join(sorted(self.values))}")

    def expect(self, name: str, found: Any) -> None:
        """Where the case states ``name``, it must be what the shipped code derives."""
        stated = self.values.pop(name, None)
        if stated is not None and stated != found:
            raise AssertionError(f"{self.method}: {name} is {found}, the case states {stated}")

    def expect_each(self, name: str, found: list[int]) -> None:
        """As :meth:`expect` for the samples of a batch: one number for all, that of each, or their sum."""
        stated = self.values.pop(name, None)
        if stated is not None and stated not in (found, sum(found)) and {stated} != set(found):
            raise AssertionError(f"{self.method}: {name} is {found}, the case states {stated}")


class Inputs(dict[str, Tensor]):
    """Tensors of a case, which note those that are read or named as a remark."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__(tensors)
        self.unread = set(tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.unread.discard(name)
        return super().get(name, default)

    def under(self, prefix: str) -> Tensors:
        """All that begin so, by the rest of their names."""
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

    def remarks(self, *names: str) -> None:
        """Inputs that say nothing to the shipped code."""
        self.unread.difference_update(names)


# ----------------------------------------------------------------------------------------------------------- helpers


def as_scores(probabilities: Tensor) -> Tensor:
    """Queries ``(B, H, L, L)`` whose products with identity keys have these probabilities as softmax."""
    return probabilities.float().log().clamp(min=-1e4)


def identity_keys(scores: Tensor) -> Tensor:
    return torch.eye(scores.shape[-1]).expand(*scores.shape[:2], -1, -1)


def attention_of(inputs: Inputs, length: int, *, logits: bool = False) -> tuple[Tensor, Tensor, float | None]:
    """Queries and keys ``(B, H, length, d)`` and their scale, whose attention the case is about.

    The recorded ``q`` and ``k``, unscaled, or such as have the recorded map ``attn`` as softmax (``logits``: as
    products).
    """
    if "attn" in inputs:
        inputs.remarks("q", "k")  # say the same
        scores = inputs["attn"].float() if logits else as_scores(inputs["attn"])
        scores = scores if scores.ndim == 4 else scores[None]
        return scores, identity_keys(scores), 1.0
    q, k = (heads_first(inputs[name].float(), length) for name in "qk")
    return q, k, None


def heads_first(x: Tensor, length: int) -> Tensor:
    """``(B, H, length, d)`` from that, from heads behind tokens, and from either without batch axis."""
    x = x if x.ndim == 4 else x[None]
    return x if x.shape[2] == length else x.transpose(1, 2)


def plain_tokens(features: Tensor, layout: Layout | None = None, **fields: Any) -> Tokens:
    """Tokens ``(B, N, D)``; a single row where the case gives no layout, so that no method can use a grid."""
    return Tokens(features, layout or Layout.grid(1, features.shape[1]), tuple(range(len(features))), **fields)


def placeholders(n: int, layout: Layout | None = None, batch: int = 1) -> Tokens:
    """For methods that read signals only."""
    return plain_tokens(torch.zeros(batch, n, 1), layout)


def prompt_of(length: int, start: int, n: int) -> Columns:
    """A prompt of ``length`` tokens, of which ``n`` from ``start`` on are visual."""
    place = torch.arange(length)[None]
    visual = (place >= start) & (place < start + n)
    return Columns(
        torch.ones_like(visual), visual, place >= start + n, lambda system: ~visual & (place >= (system or start))
    )


def paying(q: Tensor, k: Tensor, scale: float | None = None, first: int = 0) -> Callable[..., Tensor]:
    """The attention that query rows pay, as signals inside the decoder ask for it; ``q`` begins at row ``first``."""

    def pay(rows: Tensor, counted: Tensor | None) -> Tensor:
        some = q.gather(2, (rows - first)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        return rows_to_columns_attention(some, k, row_positions=rows, row_valid=counted, scale=scale)

    return pay


def select(pruner: Any, model: ModelInfo, tokens: Tokens, **signals: Tensor) -> Selection:
    """The method's only stage on this model."""
    (stage,) = pruner.stages(model)
    if set(stage.signals) != set(signals):
        raise AssertionError(f"{pruner.name} reads {sorted(stage.signals)}, the case provides {sorted(signals)}")
    return stage.select(tokens, **signals)


# ------------------------------------------------------------------------------------------------------------- FoPru


def fopru(params: Params, inputs: Inputs) -> Tensors:
    keep, ratio = params.get("keep"), params.get("ratio")
    prefix, class_token = params.get("prefix_tokens"), params.get("has_cls", False)
    prefix = int(class_token) if prefix is None else prefix
    layout = Layout.grid(*params["grid"])
    pruner = FoPru(
        **({} if keep is ratio is None else {"keep": float(ratio) if keep is None else keep}),
        **params.options("strategy", "layer", "score_kind", "direction", "reorder"),
    )
    chosen, stated = params.get("direction_chosen"), params.get("scale")
    logits = pruner.score_kind == "logits"
    q, k, scale = attention_of(inputs, prefix + layout.size, logits=logits)
    scale = stated if scale is None else scale
    params.expect("heads", q.shape[1])
    params.expect("head_dim", q.shape[3])
    params.done()
    model = ModelInfo(class_token=prefix > 0)
    (both,) = FoPru(score_kind=pruner.score_kind).stages(model)
    signals = {name: signal.reduce(q, k, scale, prefix) for name, signal in both.signals.items()}
    received, given = signals["received"], signals["given"]
    if pruner.direction != "max_variance":
        signals = {pruner.direction: signals[pruner.direction]}
    selection = select(pruner, model, placeholders(layout.size, layout, len(q)), **signals)
    if chosen is not None and selection.scores is not None:
        for b, name in enumerate(chosen):
            torch.testing.assert_close(selection.scores[b], {"received": received, "given": given}[name][b])
    entered = selection.index if selection.order is None else selection.index.gather(1, selection.order)
    return {"indices": entered, "received": received, "given": given}


# ----------------------------------------------------------------------------------------------------------- HiPrune


def hiprune(params: Params, inputs: Inputs) -> Tensors:
    family = params["family"]
    if family == "llava":
        return hiprune_llava(params, inputs)
    if family == "qwen2_5_vl":
        return hiprune_qwen(params, inputs)
    raise UnknownParameter(f"hiprune: family {family!r}")


def hiprune_llava(params: Params, inputs: Inputs) -> Tensors:
    rows, cols = params["grid"]
    views, prefix = params["views"], int(params["has_cls"])
    pruner = HiPrune(
        keep=params["budget_total"],
        object_layer=params["object_layer_1based"],
        deep_layer=params["deep_layer_index"],
        **params.options("alpha", "buffer", "border", "exclude", "query_rows"),
    )
    layout = anyres_layout(rows, cols, views, params.get("image_size_wh"))
    budgets = pruner.budgets(layout)
    params.expect("budget_per_view", budgets[0])
    count = anchor_count(budgets[0], pruner.alpha, pruner.buffer)
    params.expect("anchors_per_view", count)
    params.done("relative_selection_margin", "compat")
    model = ModelInfo(class_token=prefix > 0, encoder_layers=max(24, pruner.object_layer))

    def score(name: str) -> Tensor:
        if f"score_{name}" in inputs:
            return inputs[f"score_{name}"].view(views, -1)
        q, k = inputs[f"q_{name}"].float(), inputs[f"k_{name}"].float()
        (stage,) = pruner.stages(model)
        return stage.signals["deep"].reduce(q, k, None, prefix)  # (V, n)

    where = torch.stack([view.tokens() for view in layout.views])  # (V, n) token numbers

    def by_token(scores: Tensor) -> Tensor:
        return torch.empty(1, layout.size).index_copy(1, where.flatten(), scores.reshape(1, -1))

    anchor, deep = score("obj"), score("deep")
    tokens = placeholders(layout.size, layout)
    index = select(pruner, model, tokens, anchor=by_token(anchor), deep=by_token(deep)).index[0]
    kept = torch.zeros(layout.size, dtype=torch.uint8).index_fill(0, index[index >= 0], 1)[where]  # (V, n)
    view_of, token_of = torch.empty(layout.size, 2, dtype=torch.long).unbind(1)
    view_of[where] = torch.arange(views)[:, None].expand_as(where)
    token_of[where] = torch.arange(rows * cols).expand_as(where)
    return {
        "score_obj": anchor,
        "score_deep": deep,
        "keep_mask": kept,
        "anchors": anchors(anchor, count).sort(dim=1).values,
        "seq": torch.stack([view_of, token_of], dim=1)[index],
    }


def anyres_layout(rows: int, cols: int, views: int, image_size_wh: list[int] | None) -> Layout:
    """Thumbnail and crops of LLaVA-NeXT without separators; crops in rows of the canvas chosen for the picture."""
    if views == 1:
        return Layout.grid(rows, cols)
    down, across = views - 1, 1
    if image_size_wh is not None:
        canvases = [(672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336)]  # height, width; ties: the first
        down, across = (side // 336 for side in select_best_resolution(tuple(reversed(image_size_wh)), canvases))
        if down * across != views - 1:
            raise UnknownParameter(f"hiprune: {views} views do not fit a canvas of {down} x {across} crops")
    size, stride = rows * cols, across * cols
    crops = [
        View(rows, cols, start=size + y * rows * stride + x * cols, stride=stride, kind="crop")
        for y in range(down)
        for x in range(across)
    ]
    return Layout((View(rows, cols, kind="thumbnail"), *crops))


def hiprune_qwen(params: Params, inputs: Inputs) -> Tensors:
    rows, cols = params["merged_grid"]
    frames, *patches = params.get("grid_thw", (1, None, None))
    merge = params.get("spatial_merge_size", 2)
    if frames != 1 or patches not in ([None, None], [rows * merge, cols * merge]):
        raise UnknownParameter(f"hiprune: {frames} frames of {patches} patches for a merged grid of {rows} x {cols}")
    full = params.get("full_attention_layers_0based")
    depth = 32 if full is None else max(full) + 1
    model = ModelInfo(
        family="qwen2_5_vl",
        class_token=False,
        mrope=True,
        encoder_layers=depth,
        feature_layer=depth - 1,
        full_attention=None if full is None else tuple(full),
    )
    pruner = HiPrune(
        keep=float(params["retain"]),
        object_layer=params.get("object_layer_1based"),
        **params.options("alpha", "buffer", "border", "exclude"),
    )
    layout = Layout.grid(rows, cols)
    (k,) = pruner.budgets(layout)
    params.expect("budget", k)
    count = anchor_count(k, pruner.alpha, pruner.buffer)
    params.expect("anchors", count)

    if "q_obj" in inputs:
        anchor, deep = (window_scores(inputs, name, merge**2) for name in ("obj", "deep"))
    else:
        anchor, deep = inputs["score_obj"], inputs["score_deep"]
    tokens = placeholders(layout.size, layout)

    def kept(exclude: str) -> Tensor:
        method = HiPrune(**{**pruner.parameters(), "exclude": exclude})
        index = select(method, model, tokens, anchor=anchor[None], deep=deep[None]).index[0]
        return index[index >= 0]

    keep_idx, official = kept(pruner.exclude), kept("official")
    params.expect("kept_official", len(official))
    before, after = params.get("text_before", 0), params.get("text_after", 0)
    params.done("relative_selection_margin", "window_size_px", "patch")
    # the prompt's: text, image, text
    sequence = torch.cat([torch.arange(before), before + keep_idx, before + layout.size + torch.arange(after)])
    text = torch.arange(before).expand(3, -1)
    at = torch.arange(layout.size)
    image = before + torch.stack([torch.zeros_like(at), at // cols, at % cols])
    later = (before + max(rows, cols) + torch.arange(after)).expand(3, -1)
    return {
        "score_obj": anchor,
        "score_deep": deep,
        "keep_idx": keep_idx,
        "keep_idx_official": official,
        "anchors": anchors(anchor[None], count)[0].sort().values,
        "kept_seq_idx": sequence,
        "kept_position_ids": torch.cat([text, image, later], dim=1)[:, sequence],
    }


def window_scores(inputs: Inputs, name: str, unit: int) -> Tensor:
    """Column sums of full attention per merged token in raster order, from patches in the order of windows."""
    q, k = (inputs[f"{kind}_{name}"].float().transpose(0, 1)[None] for kind in "qk")
    sums = received_attention(q, k)[0] * q.shape[2]
    by_window = sums.unflatten(0, (-1, unit)).mean(dim=1)
    return torch.empty_like(by_window).index_copy(0, inputs["window_index"].long(), by_window)


# ----------------------------------------------------------------------------------------------------------- FocusUI

GRAPH_MODES = {"log": "log", "inverse": "inverse", "inv": "inverse", "sqrt": "sqrt", "inv_sqrt": "sqrt"}
LOSSES = ("loss", "ps_loss", "scorer_loss", "kl_loss")


def focusui(params: Params, inputs: Inputs) -> Tensors:
    for name, run in (("in.input_ids", pospad), ("in.image", uigraph)):
        if name in inputs:
            return run(params, inputs)
    return patch_scores(params, inputs)


def pospad(params: Params, inputs: Inputs) -> Tensors:
    ids, embeds = inputs["in.input_ids"], inputs["in.inputs_embeds"]
    batch, image_id = len(ids), params["image_token_id"]
    stated = {name: params.get(f"{name}_token_id") for name in ("image_drop_end", "pad", "bos")}
    token_ids = {name: (value,) for name, value in stated.items() if value is not None}
    visual = [(row == image_id).nonzero()[:, 0] for row in ids]
    sizes = [len(where) for where in visual]
    layouts = picture_layouts(inputs["in.image_grid_merged"].tolist(), sizes)
    selector = FocusUI(reduct=params["visual_reduct_ratio"], min_keep=0)
    marker = "trained" if "image_drop_end" in token_ids else "pad"
    method = PosPad(selector, marker=marker, count_markers=False)
    params.expect("marker_token_id_used", marker_token(marker, token_ids))
    params.expect_each("n_image_tokens", sizes)
    params.expect("batch", batch)
    params.expect("batch_size", batch)

    embed, shared = None, inputs["in.marker_embedding"]
    if "in.embedding_table" in inputs:
        embed, shared = torch.nn.Embedding.from_pretrained(inputs["in.embedding_table"]), marker
    scores = by_sample(inputs["in.patch_scores"], sizes)
    levels = [inputs[name].split(sizes) for name in sorted(inputs) if name.startswith("in.deepstack_")]
    inputs.remarks("in.rope_delta")  # as it was
    samples: dict[int, Tensors] = {}
    for layout in dict.fromkeys(layouts):  # equal ones are one dense batch
        rows = [b for b in range(batch) if layouts[b] == layout]
        tokens = Tokens(torch.stack([embeds[b, visual[b]] for b in rows]), layout, tuple(rows), embed=embed)
        chosen = selector.choose(tokens, selector.total(tokens.count), torch.stack([scores[b] for b in rows]))
        padded = method.padded(tokens, chosen, shared, token_ids)
        for i, b in enumerate(rows):
            kept = torch.zeros(layout.size, dtype=torch.bool).index_fill(0, chosen.index[i], True)
            own = [level[b] for level in levels]
            samples[b] = {
                "kept": kept,
                **marked_prompt(inputs, b, visual[b], padded, i, marker_token(marker, token_ids), own),
            }
    params.expect_each("n_keep", [int(samples[b]["kept"].sum()) for b in range(batch)])
    params.expect_each("n_markers", [int(samples[b].pop("markers")) for b in range(batch)])
    params.done("family", "retention_ratio", "vision_start_token_id", "spatial_merge_size")

    def joined(name: str, join: Callable[..., Tensor] = torch.stack, **how: Any) -> Tensor:
        return join([samples[b][name] for b in range(batch)], **how)

    outputs = {"image_keep_mask": joined("kept", pad_sequence, batch_first=True)}
    for name in ("sequence_keep_mask", "input_ids", "inputs_embeds", "attention_mask", "labels", "visual_pos_mask"):
        if name in samples[0]:
            outputs[name] = joined(name)
    outputs["position_ids"] = joined("position_ids", dim=-2)
    intended = [joined(f"level_{n}", torch.cat) for n in range(len(levels))]
    outputs |= {f"deepstack_intended_{n}": level for n, level in enumerate(intended)}
    if batch == 1:  # of more samples the released code mixes levels up
        official = deepstack_levels(intended, "first" if selector.reduct > 0 else "all")
        outputs |= {f"deepstack_official_{n}": level for n, level in enumerate(official)}
        outputs["deepstack_official_returned_levels"] = torch.tensor([len(official)])
    return {f"out.{name}": value for name, value in outputs.items()}


def picture_layouts(grids: list[list[int]], sizes: list[int]) -> list[Layout]:
    """The layout of each sample's pictures, of which it has as many as make up its visual tokens."""
    layouts, left = [], list(grids)
    for size in sizes:
        views: list[View] = []
        while (start := sum(view.size for view in views)) < size and left:
            rows, cols = left.pop(0)
            views.append(View(rows, cols, start=start))
        layouts.append(Layout(tuple(views)))
    if left or [layout.size for layout in layouts] != sizes:
        raise UnknownParameter(f"focusui: grids {grids} for samples of {sizes} visual tokens")
    return layouts


def by_sample(scores: Tensor, sizes: list[int]) -> list[Tensor]:
    """Scores of each sample's tokens, recorded one sample after the other or as rows with a filling."""
    if scores.ndim == 1:
        return list(scores.split(sizes))
    return [row[:size] for row, size in zip(scores, sizes, strict=True)]


def marked_prompt(
    inputs: Inputs, b: int, visual: Tensor, padded: Selection, i: int, marker_id: int, levels: list[Tensor]
) -> Tensors:
    """Sample ``b`` of the case, which is image ``i`` of the selection, with markers and without dropped tokens."""
    ids, carried = inputs["in.input_ids"][b : b + 1], inputs["in.inputs_embeds"][b : b + 1].clone()
    present = padded.index[i] >= 0
    index = padded.index[i][present]
    marks = torch.zeros(len(visual), dtype=torch.bool) if padded.markers is None else padded.markers[i]
    stays, marked = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    image = torch.zeros_like(marked).index_fill(1, visual, True)
    stays[0, visual] = False
    stays[0, visual[index]] = True
    marked[0, visual] = marks
    if padded.values is not None:
        carried[0, visual[index]] = padded.values[i][present]
    sequence = stays.nonzero()[:, 1][None]
    marked = marked[:, sequence[0]]
    positions = inputs["in.position_ids"][..., b, :]  # of one axis or three
    kept_positions = [gather_tokens(axis[None], sequence)[0] for axis in positions.view(-1, ids.shape[1])]
    follow = padded.resample[i] if padded.resample else lambda level: level[index]
    prompt = {
        "input_ids": gather_tokens(ids, sequence, marked=marked, marker=marker_id),
        "inputs_embeds": gather_tokens(carried, sequence),
        "visual_pos_mask": gather_tokens(image, sequence, marked=marked, marker=False),
    }
    if "in.attention_mask" in inputs:
        prompt["attention_mask"] = gather_tokens(inputs["in.attention_mask"][b : b + 1], sequence)
    if "in.labels" in inputs:
        prompt["labels"] = gather_tokens(inputs["in.labels"][b : b + 1], sequence, marked=marked, marker=-100)
    return {
        **{name: rows[0] for name, rows in prompt.items()},
        "sequence_keep_mask": stays[0],
        "position_ids": torch.stack(kept_positions).view(*positions.shape[:-1], -1),
        "markers": marks.sum(),
        **{f"level_{n}": follow(level)[~marks[index]] for n, level in enumerate(levels)},
    }


def patch_scores(params: Params, inputs: Inputs) -> Tensors:
    """Scores of a recorded scorer or recorded scores, and with labels its training loss."""
    outputs = {}
    if "in.image_embeds" in inputs:
        scorer = PatchScorer(params["projection_dim"], params["num_heads"], pooling=params["text_token_pooling"])
        scorer.load_state_dict(inputs.under("w."))
        image, text, mask = inputs["in.image_embeds"], inputs["in.text_embeds"], inputs.get("in.text_mask")
        image, text = (x if x.ndim == 3 else x[None] for x in (image, text))
        dtype, evaluates = params.get("dtype", "float32").split()[0], params.get("eval_mode", True)
        if dtype not in ("float32", "bfloat16") or not evaluates:
            raise UnknownParameter(f"focusui: dtype {dtype!r}, eval_mode {evaluates!r}")
        with torch.no_grad():
            scores = scorer.eval().to(getattr(torch, dtype))(image, text, None if mask is None else mask.bool())
        outputs["out.patch_scores"] = scores
    else:
        scores = inputs["in.scores" if "in.scores" in inputs else "in.patch_scores"]
        params.drop("projection_dim", "num_heads", "text_token_pooling", "dtype", "eval_mode")
    params.expect("reduction", "batchmean")
    params.expect("target_clamp", 1e-12)
    params.done("projection_dropout")
    labels = [inputs[name] for name in inputs if "label" in name or "target" in name]
    if labels:
        (label,) = labels
        loss = scorer_loss(scores.view(-1, scores.shape[-1]), label.view(-1, scores.shape[-1]))
        outputs |= {f"out.{name}": loss for name in LOSSES}
    return outputs


def uigraph(params: Params, inputs: Inputs) -> Tensors:
    image, patch, merge = inputs["in.image"], params["patch_size"], params["merge_size"]
    how, box = {"threshold": params["threshold"], "mode": params["mode"]}, params["bbox"]
    weights = {"box_weight": params["bbox_weight"], "graph_weight": params["uigraph_weight"]}
    if how["mode"] not in GRAPH_MODES:
        raise UnknownParameter(f"focusui: mode {how['mode']!r}")
    how["mode"] = GRAPH_MODES[how["mode"]]
    blocks, layout = image_blocks(image, patch * merge)
    params.expect("merged_grid", list(layout.views[0].grid))
    params.done("distance")
    graph = {"out.uigraph_merged": ui_graph(blocks, layout, **how)[0]}
    if box is None:
        return graph
    coverage = box_coverage(box, *image.shape[:2], patch)
    return {
        **graph,
        "out.bbox_merged": coverage.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).mean(dim=(1, 3)).flatten(),
        "out.fused_label_merged": supervision(image, box, patch=patch, merge=merge, **how, **weights),
    }


# -------------------------------------------------------------------------------------------------------- GlobalCom²

# width, height; ties go to the first
PINPOINTS = {"LLaVA-NeXT": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))}


def globalcom2(params: Params, inputs: Inputs) -> Tensors:
    side = params["side"]
    layout = crops_layout(params, side)
    canvas = canvas_of(layout)
    params.expect("crop_grid_wh", [canvas.across, canvas.down])
    pruner = GlobalCom2(
        keep=params["R"],
        **params.options("temperature", "alpha", "newline"),
    )
    official = GlobalCom2(**{**pruner.parameters(), "order": "official", "newline": None})
    scores = view_scores(params.get("score", "cls_logits"), inputs, side)
    thumbnail, local, where = by_canvas(scores, canvas, side)
    values = torch.empty(1, layout.size).index_copy(1, torch.cat([view.tokens() for view in layout.views]), local[None])
    (kept,) = select(pruner, ModelInfo(), placeholders(layout.size, layout), attention=values).index
    recorded = select(official, ModelInfo(), placeholders(layout.size, layout), attention=values)
    kept = kept[kept >= 0]
    params.expect("thumb_keep", int((kept < side**2).sum()))
    params.done("abs_selection_margin", "min_floor_distance", "score_mode")

    ratios = crop_ratios(richness(thumbnail, canvas), pruner.keep, pruner.temperature)
    overview = global_map(thumbnail, canvas).flatten()
    cut = [view.tokens() for view in canvas.crops]
    maps = [overview[tokens - side**2] for tokens in cut]
    judged = [token_score(values[:, tokens], g[None], pruner.alpha)[0] for tokens, g in zip(cut, maps)]
    view_of, token_of = where[:, 0], where[:, 1]  # by token number
    counts = torch.stack([(view_of[kept] == 1 + c).sum() for c in range(len(cut))])
    by_crop = kept[kept >= side**2][view_of[kept[kept >= side**2]].argsort(stable=True)]
    entry = entered(recorded)
    in_order = entry[entry >= 0]
    return {
        "scores": scores,
        "ratios": ratios[0],
        "keep_count": counts,
        "valid_count": torch.tensor([len(tokens) for tokens in cut]),
        "keep_flat": token_of[by_crop],
        "thumb_order": in_order[: int((kept < side**2).sum())],
        "global_flat": torch.cat(maps),
        "score_combined": torch.cat(judged),
        "seq_spatial": spatial_sequence(kept, where, layout, pruner, values),
        "seq_official": with_newlines_as_pairs(where, entry),
    }


def crops_layout(params: Params, side: int) -> Layout:
    """Thumbnail and unpadded crops of ``side x side`` tokens, on the best of the case's canvases for its picture."""
    (width, height), names, crops = params["image_size_wh"], params["pinpoints"], params.values.get("crop_grid_wh")
    if names == "custom":  # only the canvas that was taken is on record
        canvases, pixels = [(crops[0] * side, crops[1] * side)], side
    elif isinstance(names, str) and names not in PINPOINTS:
        raise UnknownParameter(f"globalcom2: pinpoints {names!r}")
    else:
        canvases = PINPOINTS[names] if isinstance(names, str) else names
        pixels = min(map(min, canvases))
        if crops is not None:
            pixels = select_best_resolution((height, width), [(h, w) for w, h in canvases])[1] // crops[0]
    return _anyres(height, width, tuple((h, w) for w, h in canvases), pixels, side, None)


def view_scores(score: str, inputs: Inputs, side: int) -> Tensor:
    """``(V, side * side)`` of whole views, as recorded or from what they are made of."""
    if "scores" in inputs:
        inputs.remarks("q_cls", "k")  # say the same
        return inputs["scores"]
    if score in ("cls_logits", "cls_softmax"):  # the class token's query alone
        return ClassAttention(0, logits=score == "cls_logits").reduce(inputs["q_cls"][:, :, None], inputs["k"], None, 1)
    if score == "neg_cos":
        features = inputs["features"]  # (V, n, D)
        return distinctness(features.flatten(0, 1)[None], Layout.video(len(features), side, side)).view(
            len(features), -1
        )
    raise UnknownParameter(f"globalcom2: score {score!r}")


def by_canvas(scores: Tensor, canvas: Any, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``(V, n)`` of whole views: the thumbnail's, those of valid tokens view by view, (view, token) by token
    number.
    """
    left = (canvas.across * side - canvas.cols) // 2
    pairs = torch.empty(side**2 + canvas.rows * canvas.cols, 2, dtype=torch.long)
    pairs[: side**2] = torch.stack([torch.zeros(side**2, dtype=torch.long), torch.arange(side**2)], dim=1)
    y, x = torch.arange(canvas.rows)[:, None] + canvas.top, torch.arange(canvas.cols) + left
    crop, token = y // side * canvas.across + x // side, y % side * side + x % side
    pairs[side**2 :] = torch.stack([1 + crop.flatten(), token.flatten()], dim=1)
    numbers = torch.cat([view.tokens() for view in (canvas.thumbnail, *canvas.crops)])
    return scores[:1], scores[pairs[numbers, 0], pairs[numbers, 1]], pairs


def entered(selection: Selection) -> Tensor:
    """What of a single picture enters, in order: token numbers, and -1 for a separator."""
    index, order = kept(selection), selection.order[0]
    order = order[order < len(index)]
    return torch.where(order >= 0, index[order.clamp(min=0)], -1)


def with_newlines_as_pairs(where: Tensor, entry: Tensor) -> Tensor:
    """(view, token) in order of entry, (-1, -1) for a separator."""
    return torch.where((entry >= 0)[:, None], where[entry.clamp(min=0)], -1)


def spatial_sequence(kept: Tensor, where: Tensor, layout: Layout, pruner: GlobalCom2, values: Tensor) -> Tensor:
    """Kept tokens in ascending order and the newlines that the stage keeps."""
    (stage,) = pruner.stages(ModelInfo())
    selection = stage.select(placeholders(layout.size, layout), attention=values)
    if selection.order is not None:
        return with_newlines_as_pairs(where, entered(selection))
    if stage.newlines != "keep":
        raise AssertionError(f"globalcom2: newlines {stage.newlines!r}")
    ends = torch.searchsorted(kept, torch.tensor([newline.last for newline in layout.newlines])).tolist()
    rows = [kept[start:stop] for start, stop in itertools.pairwise([0, *ends, len(kept)])]
    newline = torch.tensor([-1])
    return with_newlines_as_pairs(where, torch.cat([part for row in rows for part in (row, newline)][:-1]))


# ------------------------------------------------------------------------------------------------------------- ToDRE


def todre(params: Params, inputs: Inputs) -> Tensors:
    stage = params["stage"]
    if stage == 1:
        return todre_diversify(params, inputs)
    if stage == 2:
        return todre_remove(params, inputs)
    raise UnknownParameter(f"todre: stage {stage!r}")


def todre_diversify(params: Params, inputs: Inputs) -> Tensors:
    features = inputs["features"][None]
    keep, ratio = params.get("keep"), params.get("ratio")
    rule, stated = params["pivot"], params.get("pivot_index")
    if rule == "random" and stated is not None:
        rule = stated  # whose generator drew it is not part of the method
    pruner = ToDRE(keep=float(ratio) if keep is None else keep, diversity=params["mode"], pivot=rule, stage2=False)
    layout = Layout.grid(1, features.shape[1])
    signals = {}
    if rule == "cls":
        if "cls_attn" in inputs:
            attention = inputs["cls_attn"]
        else:
            q, k, scale = attention_of(inputs, inputs["attn" if "attn" in inputs else "k"].shape[-2])
            attention = ClassAttention(0).reduce(q, k, scale, 1)[0]
        layout = candidate_layout(attention, features.shape[1])
        rest = features.shape[1] - attention.numel()  # tokens that may not be the pivot
        signals["class_attention"] = torch.cat([attention.flatten(), torch.full((rest,), torch.inf)])[None]
        pivot = attended_pivot(signals["class_attention"], layout)
    else:
        inputs.remarks("cls_attn")
        pivot = select(ToDRE(keep=1, pivot=rule, stage2=False), ModelInfo(), plain_tokens(features)).index[:, 0]
    if stated is not None and pivot.item() != stated:
        raise AssertionError(f"todre: pivot {pivot.item()}, the case states {stated}")
    params.done()
    order = diversification(features, pruner.count(layout), pivot, pruner.diversity)
    chosen = select(pruner, ModelInfo(), plain_tokens(features, layout), **signals)
    return {"order": order[0], "indices": chosen.index[0]}


def candidate_layout(attention: Tensor, n: int) -> Layout:
    """``(f, t)``: frames; ``(n,)``: one picture; fewer than n: a thumbnail in front of crops."""
    if attention.ndim == 2:
        return Layout.video(attention.shape[0], 1, attention.shape[1])
    if len(attention) == n:
        return Layout.grid(1, n)
    thumbnail = View(1, len(attention), kind="thumbnail")
    return Layout((thumbnail, View(1, n - len(attention), start=len(attention), kind="crop")))


def todre_remove(params: Params, inputs: Inputs) -> Tensors:
    pruner = ToDRE(tau=params["tau"], stage1=False)
    scores, role = as_scores(inputs["attn"]), inputs["role"]
    params.expect("checked_layers", len(scores))
    params.done()
    visual, text = (role == n for n in (1, 2))
    rows = [x.expand(len(scores), -1) for x in (torch.ones_like(visual), visual, text)]
    columns = Columns(*rows, lambda system_tokens: rows[2])
    (stage, *_) = pruner.stages(ModelInfo())
    shares = stage.signals["shares"].reduce(paying(scores, identity_keys(scores), 1.0), columns)  # (checks, 2)
    index = stage.select(placeholders(1, batch=len(scores)), shares=shares).index
    passed = (index < 0).all(dim=1).nonzero().squeeze(1)
    first = passed[:1] if len(passed) else torch.tensor([-1])
    return {"alpha_t2v": shares[:, 0], "alpha_v2t": shares[:, 1], "remove_at": first[0]}


# ----------------------------------------------------------------------------------------------------------- mergers


def tower(prefix: int, layers: int = 1) -> ModelInfo:
    """A vision model of nothing but blocks."""
    return ModelInfo(encoder_layers=layers, feature_layer=layers - 1, prefix_tokens=prefix)


def merge_step(
    stage: InTower, prefix: int, metric: Tensor, x: Tensor, sizes: Tensor | None
) -> tuple[Groups, Tensor, Tensor]:
    """One block's selection and merge: ``sizes (B, N)`` go in and come out."""
    count = stage.removes(x.shape[1])
    if not count:
        rows = torch.arange(x.shape[1]).expand(len(x), -1)
        return Groups(rows, rows[:, :0], rows[:, :0]), x, torch.ones(x.shape[:2]) if sizes is None else sizes
    groups = stage.select(BlockTokens(x, prefix, count), metric)
    places = groups.keep, groups.source, groups.target
    if stage.weighting == "size":
        return groups, *merge_tokens(x, *places, sizes)
    kept = x.gather(1, groups.keep[..., None].expand(-1, -1, x.shape[2]))
    merged = kept if stage.weighting == "prune" else merge_tokens(x, *places)[0]
    return groups, merged, merged_sizes(*places, sizes)


def prefix_rows(params: Params) -> int:
    """Rows in front that never merge."""
    known = params.get("num_prefix_tokens")
    named = sum(int(params.get(name, False)) for name in ("class_token", "distill_token"))
    return named if known is None else known


def merged(prefix: int, history: list[Groups], x: Tensor, sizes: Tensor) -> tuple[Tensors, MergeTrace]:
    """What all kinds of merger cases end with."""
    batch, n = len(x), history[0].keep.shape[1] + history[0].source.shape[1]
    trace = MergeTrace("", {}, prefix, [n, x.shape[1]], list(enumerate(history)), (batch, x.device))
    return {"x_out": x, "size_out": sizes[..., None], "assign": trace.rows()}, trace


def even_odd(groups: Groups) -> Tensors:
    """Positions in the sets of even and odd rows."""
    even = groups.keep % 2 == 0
    return {
        "unm_pos": groups.keep[even].view(len(even), -1) // 2,
        "src_pos": groups.source // 2,
        "dst_pos": groups.keep.gather(1, groups.target) // 2,
    }


def chain(stages: list[InTower], prefix: int, counts: list[int], x: Tensor) -> Tensors:
    """Blocks without attention: the current tokens are the metric."""
    history, sizes = [], None
    for stage, count in zip(stages, counts, strict=True):
        groups, x, sizes = merge_step(stage, prefix, x, x, sizes)
        history.append(groups)
        if x.shape[1] != count:
            raise AssertionError(f"block {stage.layer} leaves {x.shape[1]} tokens, the case states {count}")
    return merged(prefix, history, x, sizes)[0]


def tome(params: Params, inputs: Inputs) -> Tensors:
    kind = params["kind"]
    if kind == "schedule":
        return tome_schedule(params)
    if kind == "proportional_attention":
        q, k, v, size = (inputs[name] for name in ("q", "k", "v", "size"))
        scale, heads = params["scale"], params["heads"]
        params.done()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, size_bias(size[..., 0]), scale=scale)
        if out.shape[1] != heads:
            raise AssertionError(f"tome: {out.shape[1]} heads, the case states {heads}")
        return {"out": out.transpose(1, 2).flatten(2), "k_mean": k.mean(dim=1)}
    prefix = prefix_rows(params)
    if kind == "kth":
        return tome_kth(params, inputs, prefix)
    if kind == "chain":
        remark = params["metric"]
        r, counts = params["r"], params["token_counts"]
        params.done("smallest_decision_gap")
        if not remark.startswith("the current tokens"):
            raise UnknownParameter(f"tome: metric {remark!r}")
        pruner = ToMe(r=r, order="official", prop_attn=params.get("prop_attn", True))
        stages = list(pruner.stages(tower(prefix, len(counts))))
        return chain(stages, prefix, counts, inputs["x"])
    if kind != "layer":
        raise UnknownParameter(f"tome: kind {kind!r}")
    metric, size = inputs["metric"], inputs.get("size")
    x = inputs.get("x", metric)
    asked = {"ratio": params["ratio"]} if "ratio" in params.values else {"r": params["r_requested"]}
    (stage,) = ToMe(order="official", **asked).stages(tower(prefix))
    params.expect("r_effective", stage.removes(x.shape[1]))
    params.done("smallest_decision_gap")
    groups, x, sizes = merge_step(stage, prefix, metric, x, None if size is None else size[..., 0])
    results, trace = merged(prefix, [groups], x, sizes)
    positions = even_odd(groups)
    rows = torch.arange(x.shape[1])
    if prefix == 2:
        # the official unmerge forgets that merging moved the distillation token, the first odd row, to place 1
        odd = positions["unm_pos"].shape[1]
        rows = torch.cat([rows[:1], rows[odd : odd + 1], rows[1:odd], rows[odd + 1 :]])
    return {**results, **positions, "x_unmerged": trace.unmerge(x[:, rows])}


def tome_kth(params: Params, inputs: Inputs, prefix: int) -> Tensors:
    """The released code drops what is left behind the last whole period; ours must not touch it."""
    k, metric, size = params["k"], inputs["metric"], inputs.get("size")
    x, n = inputs.get("x", metric), metric.shape[1]
    (stage,) = ToMe(matching="kth", k=k).stages(tower(prefix))
    params.expect("r_effective", stage.removes(n))
    params.done("smallest_decision_gap")
    groups, out, sizes = merge_step(stage, prefix, metric, x, None if size is None else size[..., 0])
    results, trace = merged(prefix, [groups], out, sizes)
    periods = (n - prefix) // k
    rows, whole = prefix + periods, prefix + periods * k  # that the released code has, of those that it looks at
    old = torch.ones(x.shape[:2]) if size is None else size[..., 0]
    for what, tail, untouched in (
        ("tokens", out[:, rows:], x[:, whole:]),
        ("sizes", sizes[:, rows:], old[:, whole:]),
        ("rows", results["assign"][:, whole:], torch.arange(rows, rows + n - whole).expand(len(x), -1)),
    ):
        if not torch.equal(tail, untouched):
            raise AssertionError(f"tome: {what} behind the last of {periods} periods of {k} are not as they were")
    return {
        "x_out": out[:, :rows],
        "size_out": results["size_out"][:, :rows],
        "assign": results["assign"].index_fill(1, torch.arange(whole, n), ANY),
        "src_pos": torch.arange(periods * (k - 1)).expand(len(x), -1),
        "dst_pos": groups.target - prefix,
        "x_unmerged": trace.unmerge(out)[:, :whole],
    }


def tome_schedule(params: Params) -> Tensors:
    layers, r, form = params["layers"], params["r"], params["form"]
    params.done()
    if form == "(r, inflection)":
        return {"out": torch.tensor(schedule(r[0], layers, r[1]))}
    if form not in ("int", "list"):
        raise UnknownParameter(f"tome: schedule form {form!r}")
    return {"out": torch.tensor(schedule(tuple(r) if form == "list" else r, layers))}


def pitome_stage(layer: Case, prefix: int, i: int = 0, layers: int = 1) -> InTower:
    """A block of the wanted variant with a margin given outright."""
    order = {"pitome": "plain", "bsm_pitome": "deit", "bsm": "llava"}[layer["variant"]]
    pruner = PiToMe(
        ratio=layer["ratio"],
        order=order,
        margin=(layer["margin"],) * 2,
        alpha=layer.get("alpha", 1.0),
        metric="keys",
        weighting=layer.get("weighting", "size"),
    )
    return pruner.block(0 if order == "deit" else i, tower(prefix, layers))


def pitome(params: Params, inputs: Inputs) -> Tensors:
    kind, prefix = params["kind"], prefix_rows(params)
    if kind == "chain":
        remark, layers, counts = params["metric"], params["layers"], params["token_counts"]
        params.done("smallest_energy_gap", "smallest_decision_gap")
        if not remark.startswith("the current tokens"):
            raise UnknownParameter(f"pitome: metric {remark!r}")
        stages = [pitome_stage(layer, prefix, i, len(layers)) for i, layer in enumerate(layers)]
        return chain(stages, prefix, counts, inputs["x"])
    if kind != "layer":
        raise UnknownParameter(f"pitome: kind {kind!r}")
    variant, margin, alpha = params["variant"], params["margin"], params.get("alpha", 1.0)
    weighting = "size" if params.get("weighted", True) else "mean"
    if (mode := params.get("mode", "mean")) not in ("mean", "prune"):
        raise UnknownParameter(f"pitome: mode {mode!r}")
    layer = {"variant": variant, "ratio": params["ratio"], "margin": margin, "alpha": alpha}
    stage = pitome_stage({**layer, "weighting": "prune" if mode == "prune" else weighting}, prefix)
    metric, size = inputs["metric"], inputs.get("size")
    x = inputs.get("x", metric)
    params.expect("r", stage.removes(x.shape[1]))
    params.done("smallest_decision_gap", "smallest_energy_gap")
    groups, x, sizes = merge_step(stage, prefix, metric, x, None if size is None else size[..., 0])
    results, _ = merged(prefix, [groups], x, sizes)
    if variant == "bsm":
        return {**results, **even_odd(groups)}
    energy = similarity_energy(metric[:, prefix:], margin, alpha=alpha)
    order = ranked(energy)
    r = groups.source.shape[1]
    pairs = r if variant == "pitome" else order.shape[1] // 2
    first = groups.keep.shape[1] - pairs  # the targets leave last
    source, stay = groups.source - prefix, groups.keep[:, prefix:first] - prefix
    results |= {
        "energy": energy,
        "order": order,
        "b_idx": groups.keep[:, first:] - prefix,
        "dst_pos": groups.target - first,
    }
    if variant == "pitome":
        return {**results, "protected_idx": stay, "a_idx": source}
    sources = order[:, 0::2]

    def position(tokens: Tensor) -> Tensor:
        return (tokens[:, :, None] == sources[:, None]).long().argmax(dim=-1)

    return {**results, "a_idx": sources, "unm_pos": position(stay), "src_pos": position(source)}


# --------------------------------------------------------------------------------------------------------- baselines


def baselines(params: Params, inputs: Inputs) -> Tensors:
    name = params["method"]
    if name not in BASELINES:
        raise UnknownParameter(f"baselines: method {name!r}")
    return BASELINES[name](params, inputs)


def divprune(params: Params, inputs: Inputs) -> Tensors:
    features = inputs["features"][None]
    keep, ratio = params.get("keep"), params.get("ratio")
    pruner = DivPrune(keep=keep if ratio is None else float(ratio))
    k = pruner.total(features.shape[1])
    if keep is not None and k != keep:
        raise AssertionError(f"divprune: ratio {ratio} keeps {k}, the case states {keep}")
    params.done()
    chosen = select(pruner, ModelInfo(), plain_tokens(features))
    return {"order": diverse_subset(features, k)[0], "indices": chosen.index[0]}


@dataclass(frozen=True)
class RecordedClip:
    """Stands where a CLIP model would: its embeddings were recorded."""

    text: Tensor  # (M, E)

    def image_embeds(self, features: Tensor) -> Tensor:
        return features

    def text_embeds(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.text[None], torch.ones(1, len(self.text), dtype=torch.bool)


def cdpruner(params: Params, inputs: Inputs) -> Tensors:
    features, image = inputs["features"], inputs["image_embeds"]  # (V, n, D), (V, n, E): the crops of one picture
    keep, sign = params["keep"], params.get("relevance_sign", -1)
    scope = params.get("minmax_scope", "whole batch")
    if not scope.startswith("whole batch") or sign not in (-1, 1):
        raise UnknownParameter(f"cdpruner: minmax_scope {scope!r}, relevance_sign {sign!r}")
    params.done()
    crops, n, _ = features.shape
    text, asked = inputs.get("text_embeds", image.new_zeros(1, image.shape[-1])), {}
    if "text_embeds" in inputs:
        word = torch.zeros(1, 1, 1)
        asked = {
            "instruction": word,
            "instruction_mask": word[..., 0] == 0,
            "instruction_ids": word[..., 0].long(),
        }
    tokens = plain_tokens(features.flatten(0, 1)[None], Layout.video(crops, 1, n), **asked)
    pruner = CDPruner(keep=keep * crops, clip=RecordedClip(text if sign == -1 else -text))  # CLIP relevance is negated
    chosen = select(pruner, ModelInfo(), tokens, features=image.flatten(0, 1)[None])
    return {"indices": chosen.index.view(crops, keep) - n * torch.arange(crops)[:, None]}


def visionzip(params: Params, inputs: Inputs) -> Tensors:
    hidden, keys = inputs["hidden"].float(), inputs["k"].float()
    q, k, scale = attention_of(inputs, hidden.shape[1])
    prefix = int(params.get("has_cls", True))
    pruner = VisionZip(dominant=params["dominant"], contextual=params["contextual"])
    params.done()
    (stage,) = pruner.stages(ModelInfo(class_token=bool(prefix)))
    signals = {
        name: stage.signals[name].reduce(hidden, prefix) for name in ("features", "class_features")[: 1 + prefix]
    }
    signals["attention"] = stage.signals["attention"].reduce(q, k, scale, prefix)
    signals["keys"] = stage.signals["keys"].reduce(q, keys, None, prefix)
    if prefix:
        signals["class_features"] = signals["class_features"][:, None]  # of an only view
    tokens = plain_tokens(hidden[:, prefix:])
    tokens.project = lambda features: features  # the recorded tokens are not projected yet
    chosen = select(pruner, ModelInfo(class_token=bool(prefix)), tokens, **signals)
    places = chosen.index.gather(1, chosen.order)  # in order of entry
    dominant = places[:, : pruner.dominant] + prefix
    if prefix:
        dominant[:, 0] = 0  # the class token stands first, on a borrowed place
    return {"tokens": chosen.values[torch.arange(len(q))[:, None], chosen.order], "dominant": dominant}


def fastv(params: Params, inputs: Inputs) -> Tensors:
    start, n = params["image_start"], params["num_visual"]
    removed = params.get("R")
    keep = params.get("keep")
    pruner = FastV(keep=keep if removed is None else 1.0 - removed, k=params.get("K", 2))
    if keep is not None and budget(pruner.keep, n) != keep:
        raise AssertionError(f"fastv: R={removed} keeps {budget(pruner.keep, n)}, the case states {keep}")
    params.done()
    q, k, scale = attention_of(inputs, inputs["attn" if "attn" in inputs else "k"].shape[-2])
    length = k.shape[2]
    (stage,) = pruner.stages(ModelInfo())
    first = length - q.shape[2]
    last = stage.signals["attention"].reduce(paying(q, k, scale, first), prompt_of(length, start, n))[
        :, start : start + n
    ]
    index = stage.select(placeholders(n), attention=last).index[0]
    return {
        "keep_positions": torch.cat([torch.arange(start), start + index, torch.arange(start + n, length)]),
    }


BASELINES: dict[str, Callable[[Params, Inputs], Tensors]] = {
    "divprune": divprune,
    "cdpruner": cdpruner,
    "visionzip": visionzip,
    "fastv": fastv,
}


# ------------------------------------------------------------------------------------------------------------- QuoTA


def quota(params: Params, inputs: Inputs) -> Tensors:
    if "llm_output" in params.values:
        expected, found = params["expected_objects"] or [], parsed_objects(params["llm_output"])
        params.done("meaning")
        assert found == expected, f"quota: objects {found}, the case states {expected}"
        return {}
    assigner, side = params["version"], params["side"]
    unit = params.get("tokens_per_frame_unit"), params.get("frames_unit")
    total = params["target_total"] if None in unit else unit[0] * unit[1]
    params.expect("target_total", total)
    frames = inputs["in.tokens"].unflatten(1, (side, side))
    if params["pool_before"]:
        frames = pooled(frames)
    pruner = QuoTA(
        keep=total,
        assigner=assigner,
        **params.options("score_scale", "score_power", "remainder", "min_tokens_per_frame"),
    )
    stated, cap = params.get("cap_weight"), params.get("cap")
    params.done("official_version")
    source = tuple(frames.shape[1:3])
    size = source[0] * source[1]
    cap = cap or ("none" if stated is None else "official")
    if stated is not None and not math.isclose(stated, size / total):
        raise AssertionError(f"quota: a frame of {size} tokens caps at {size / total}, the case states {stated}")
    weights = frame_weights(checked_scores(inputs["in.frame_scores"]), pruner.score_power, pruner.score_scale)
    budgets = frame_budgets(weights, total, size, cap, pruner.remainder, pruner.min_tokens_per_frame)
    grids = [frame_grid(b, source, limited=cap != "none") for b in budgets]
    layout = Layout.video(len(frames), *source)
    selection = resampled(layout, list(frames), budgets, assigner, limited=cap != "none")
    outputs = {
        "weights": torch.from_numpy(CAPS[cap](weights, size / total)),
        "budgets": torch.tensor(budgets),
        "counts": torch.tensor([h * w for h, w in grids] if assigner in GRID else budgets),
        "tokens": selection.values[0],
        "grid": torch.tensor(grids),
    }
    assert selection.values.shape[1] == int(outputs["counts"].sum())
    newline = inputs.get("in.newline")
    if assigner in GRID and newline is not None:
        outputs["tokens_grid_newline"] = with_newlines(selection.values[0], grids, newline)
    return {f"out.{name}": value for name, value in outputs.items()}


# -------------------------------------------------------------------------------------------------------- TransPrune


def transprune(params: Params, inputs: Inputs) -> Tensors:
    params.get("kind")
    for names, run in (
        ({"attn_in"}, transprune_transitions),
        ({"q_text"}, transprune_step),
        ({"inputs_embeds"}, transprune_run),
    ):
        if names <= set(inputs):
            return run(params, inputs)
    raise UnknownParameter(f"transprune: inputs {sorted(inputs)}")


def transprune_transitions(params: Params, inputs: Inputs) -> Tensors:
    tokens, dim = inputs["attn_in"].shape
    params.expect("tokens", tokens)
    params.expect("dim", dim)
    turn, over = params.get("direction", "signed"), params.get("softmax_over", "sequence")
    direction = named(turn, {"|cos|": "abs", "unsigned": "abs", "signed": "signed", "abs": "abs"})
    start, n = params.get("image_start", 0), params.get("num_image", tokens)
    signal = TransitionVariation(0, direction, named(over, {"sequence": "sequence", "image": "image"}))
    columns = prompt_of(tokens, start, n)
    params.done()

    def share(block: str) -> Tensor:
        return signal.reduce(inputs[f"{block}_in"][None], inputs[f"{block}_out"][None], columns)[0]

    attention, mlp = share("attn"), share("ffn")
    return {"ttv_attn": attention, "ttv_ffn": mlp, "ttv": attention + mlp}


def named(text: str, meanings: Mapping[str, str]) -> str:
    """What a description means, by the first of these words that it has.

    Raises:
        UnknownParameter: it has none of them.
    """
    for word, meaning in meanings.items():
        if word in text:
            return meaning
    raise UnknownParameter(f"{text!r} speaks of none of {', '.join(meanings)}")


def transprune_step(params: Params, inputs: Inputs) -> Tensors:
    start, n, entered = params["image_start"], params["num_image"], params["original_num_image"]
    layers = inputs.get("ttv_layers", torch.empty(0, 1))
    read = tuple(range(1, len(layers) + 1))
    pruner = TransPrune(
        ratios=(params["ratio"],),
        prune_layers=(max(1, len(read)),),
        accumulate_layers=read,
        **params.options("alpha", "direction", "softmax_scope"),
    )
    k = inputs["k_all"][None]
    params.expect("query_positions", f"{start + n}..{k.shape[2] - 1}")
    params.expect("causal", True)
    image = slice(start, start + n)
    signals = {f"transition_{i}": layer[None, image] for i, layer in zip(read, layers)}
    paid = InstructionAttention(0).reduce(
        paying(inputs["q_text"][None], k, None, start + n), prompt_of(k.shape[2], start, n)
    )
    signals["attention"] = paid[:, image]
    tokens = placeholders(n)
    tokens.entered = entered
    transitions = tuple(signals[f"transition_{i}"] for i in read)
    score, index = combined_score(transitions, signals["attention"], pruner.alpha), keep_all(tokens).index
    if pruner.ratios[0] < 1:  # else there is no stage
        selection = select(pruner, ModelInfo(), tokens, **signals)
        score, index = score if selection.scores is None else selection.scores, selection.index
    params.expect("keep", index.shape[1])
    params.done()
    return {"score": score[0], "keep": index[0]}


def transprune_run(params: Params, inputs: Inputs) -> Tensors:
    convention = params.get("layer_convention", "1-based")
    if not convention.startswith("1-based"):
        raise UnknownParameter(f"transprune: layer_convention {convention!r}")
    pruner = TransPrune(
        **params.options("accumulate_layers", "prune_layers", "ratios", "alpha", "direction", "softmax_scope")
    )
    positions = params.get("positions", "auto")
    start, n, after = params["image_start"], params["num_image"], params["text_after"]
    embeds = inputs["inputs_embeds"]
    params.expect("hidden", embeds.shape[1])
    assert len(embeds) == start + n + after
    text = LlamaConfig(
        hidden_size=embeds.shape[1],
        intermediate_size=params["intermediate"],
        num_hidden_layers=params["layers"],
        num_attention_heads=params["heads"],
        num_key_value_heads=params["kv_heads"],
        hidden_act=params["act"],
        rms_norm_eps=params["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
    )
    params.done()
    model, ids = recorded_model(text, inputs.under("weights/"), embeds, slice(start, start + n))

    rotations: dict[int, Tensor] = {}  # what each layer's attention rotates the newest token by
    for i, layer in enumerate(model.language_model.layers):

        def note(module: Any, args: Any, kwargs: Any, i: int = i) -> None:
            cos, sin = (x[0, -1, :] for x in kwargs["position_embeddings"])
            slowest = len(cos) // 2 - 1  # less than a turn in any sequence that fits here
            rotations[i] = torch.atan2(sin[slowest], cos[slowest]) / model.language_model.rotary_emb.inv_freq[slowest]

        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), attach(model, pruner, positions=positions) as session:
        run = model(input_ids=ids, pixel_values=torch.zeros(n, 3, 1, 1), use_cache=True)
        cache, images = compat.returned_cache(run), session.trace.images
        kept = [
            torch.tensor([i for i, image in enumerate(images) if len(image.kept_at(layer))])
            for layer in pruner.schedule(ModelInfo(decoder_layers=text.num_hidden_layers))
        ]
        gone = sorted(set(range(n)) - set(kept[-1].tolist()))
        survivors = [i for i in range(len(embeds)) if i - start not in gone]
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        hidden, turned = [], []
        for token in inputs["decode_ids"]:
            step = model(input_ids=token.view(1, 1), **compat.cache_argument(model.forward, cache), use_cache=True)
            hidden.append(step.last_hidden_state[0, 0])
            turned.append(torch.stack([rotations[i] for i in sorted(rotations)]).round().long())
    return {
        "prefill_hidden": run.last_hidden_state[0, survivors],
        "decode_hidden": torch.stack(hidden),
        "decode_positions": torch.stack(turned),
        "kv_len": torch.tensor(lengths),
        **{f"keep_{i}": index for i, index in enumerate(kept)},
    }


def recorded_model(text: LlamaConfig, weights: Tensors, embeds: Tensor, image: slice) -> tuple[LlavaModel, Tensor]:
    """A LLaVA around recorded decoder weights that sees ``embeds (L, D)``, and the ids to call it with.

    Its vocabulary goes on behind the recorded one with the prompt's embeddings. Every visual token is a picture by
    itself, which no layout of a real tower limits.
    """
    known = len(weights["embed_tokens.weight"])
    text.vocab_size = known + len(embeds) + 1
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=1, patch_size=1
    )
    placeholder = text.vocab_size - 1
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=placeholder, image_token_id=placeholder
    )
    model = LlavaModel(config).eval()
    vocabulary = torch.cat([weights["embed_tokens.weight"], embeds, embeds[:1]])
    model.language_model.load_state_dict({**weights, "embed_tokens.weight": vocabulary})
    features = BaseModelOutputWithPooling(pooler_output=list(embeds[image, None]))
    model.get_image_features = lambda **_: features
    ids = known + torch.arange(len(embeds))
    ids[image] = placeholder
    return model, ids[None]


# ------------------------------------------------------------------------------------------------------ CoreMatching


def corematching(params: Params, inputs: Inputs) -> Tensors:
    params.get("kind")
    params.get("source")
    for names, run in (
        ({"k_in", "v_in"}, corematching_released),
        ({"gate", "up", "down"}, corematching_mlp),
        ({"counts"}, corematching_knee),
        ({"act"}, corematching_core),
    ):
        if names <= set(inputs):
            return run(params, inputs)
    raise UnknownParameter(f"corematching: inputs {sorted(inputs)}")


def corematching_released(params: Params, inputs: Inputs) -> Tensors:
    act = inputs["act"][None]
    start, n = params["image_start"], params["num_image"]
    length = act.shape[1]
    params.expect("seq", length)
    params.expect("neurons", act.shape[2])
    params.expect("cache_mode", "zero")
    (stage, *_) = CoreMatching(mode="released").stages(ModelInfo())
    (signal,) = stage.signals.values()
    params.expect("reference_row", length + signal.row)
    matches = signal.reduce(act, prompt_of(length, start, n))[:, start : start + n]
    expect_knee(params, matches)
    choose = stage.select
    if threshold_of(params, ">") == ">=":  # as the authors' notebook has it
        choose = CoreMatching(threshold=">=", min_keep=0).core_tokens
    params.done("distance")
    index = kept(choose(placeholders(n), matches=matches))
    gone = torch.zeros(1, length, dtype=torch.bool)
    gone[:, start : start + n] = True
    gone[:, start + index] = False
    cached = {f"{name}_out": zero_rows(inputs[f"{name}_in"][None], gone)[0] for name in "kv"}
    return {"counts": matches[0], "keep": index, **cached}


def threshold_of(params: Params, default: str) -> str:
    """Which side of the knee a rule such as "keep if count > knee value (strict)" puts the knee itself on."""
    if "rule" not in params.values:
        return params.get("threshold", default)
    return named(params["rule"], {"count >= knee": ">=", "count > knee": ">"})


def kept(selection: Selection) -> Tensor:
    """Of a single picture, without padding."""
    return selection.index[0][selection.index[0] >= 0]


def expect_knee(params: Params, counts: Tensor) -> None:
    place, value = knee(counts)
    params.expect("knee_index", place.item())
    params.expect("knee_value", float(value))


def corematching_mlp(params: Params, inputs: Inputs) -> Tensors:
    pruner = CoreMatching(**params.options("rho", "beta", "topk"))
    gate, up, down = (inputs[name] for name in ("gate", "up", "down"))
    config = LlamaConfig(
        hidden_size=gate.shape[1], intermediate_size=len(gate), num_attention_heads=1, hidden_act=params["act"]
    )
    for name, rule in (("prefill", "dense"), ("decode", "restricted to core")):
        if rule not in params[name]:
            raise UnknownParameter(f"corematching: {name}")
    params.done()
    mlp = LlamaMLP(config).requires_grad_(False)
    mlp.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down})
    seen: list[Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    sparse = SparseMLP(mlp)
    prefill = mlp(inputs["x_prefill"][None])
    core = recorded_core(inputs, neuron_counts(seen[0], pruner.rho, topk=pruner.topk), pruner.beta)
    sparse.serve(core)
    decode = torch.cat([mlp(x.view(1, 1, -1)) for x in inputs["x_decode"]])
    return {"y_prefill": prefill[0], "core": core[0].nonzero().squeeze(1), "y_decode": decode[:, 0]}


def corematching_knee(params: Params, inputs: Inputs) -> Tensors:
    counts = inputs["counts"][None]
    expect_knee(params, counts)
    above = {name: above_knee(counts, rule)[0].nonzero().squeeze(1) for name, rule in (("ge", ">="), ("gt", ">"))}
    params.expect("keep_gt_is_empty", not len(above["gt"]))
    params.done()
    return {f"keep_{name}": index for name, index in above.items()}


def corematching_core(params: Params, inputs: Inputs) -> Tensors:
    act = inputs["act"][None]
    threshold = threshold_of(params, ">=")
    pruner = CoreMatching(threshold=threshold, **params.options("rho", "beta", "topk", "min_keep", "max_keep"))
    neurons = int(pruner.beta * act.shape[2])
    if "image_start" in params.values and params.values.get("budget", neurons) != neurons:
        pruner = replace(pruner, budget=params["budget"])  # of tokens
    counts = neuron_counts(act, pruner.rho, topk=pruner.topk)
    core = recorded_core(inputs, counts, pruner.beta)
    params.expect("budget", neurons)
    params.expect("k_per_token", int(counts.sum()) // act.shape[1])
    params.expect("selected", int(core.sum()))
    found = {"neuron_counts": counts[0], "core": core[0].nonzero().squeeze(1)}
    if "image_start" in params.values:
        image = slice(start := params["image_start"], start + params["num_image"])
        matches = match_counts(act[:, image] > 0, core)
        expect_knee(params, matches)
        tokens = placeholders(matches.shape[1])
        tokens.entered = tokens.count
        selection = pruner.core_tokens(tokens, matches)
        found |= {"counts": matches[0], "keep": kept(selection)}
    params.done("tie_at_boundary", "tie_rule")
    return found


def recorded_core(inputs: Inputs, counts: Tensor, beta: float) -> Tensor:
    """The core neurons, ``(1, F)`` bool. Where counts tie at the boundary, the case comes with the recorded choice
    ``core``.

    The released sort is unstable, so any neurons with the same counts as ours are as good; what follows follows the
    record.
    """
    ours = core_neurons(counts, beta)
    if "core" not in inputs:
        return ours
    theirs = inputs["core"].long()
    if len(theirs.unique()) != len(theirs):
        raise AssertionError(f"corematching: core neurons {theirs.tolist()} are not distinct")
    mine, other = counts[ours].sort().values, counts[0, theirs].sort().values
    if not torch.equal(mine, other):
        raise AssertionError(
            f"corematching: core neurons have counts {mine.tolist()}, the recorded ones {other.tolist()}"
        )
    return torch.zeros_like(ours).index_fill(1, theirs, True)


RUNNERS: dict[str, Callable[[Params, Inputs], Tensors]] = {
    "focusui": focusui,
    "fopru": fopru,
    "globalcom2": globalcom2,
    "hiprune": hiprune,
    "todre": todre,
    "tome": tome,
    "pitome": pitome,
    "baselines": baselines,
    "quota": quota,
    "transprune": transprune,
    "corematching": corematching,
}
