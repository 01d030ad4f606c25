"""Statement: the golden runner maps every form of case that the methods' specifications name.

Recorded cases exist for some forms only. The others are made here: small inputs, and outputs from plain loops over the
formulas, never from the method under test. Each made case must pass, and fail as soon as any of its outputs is changed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests import goldens
from tests.test_goldens import check

GOLDENS = Path(__file__).parent / "data" / "goldens"
EXACT, CLOSE = "exact", "allclose atol 1e-5"


def proves(
    method: str,
    params: dict[str, Any],
    inputs: dict[str, ArrayLike | Tensor],
    outputs: dict[str, ArrayLike | Tensor],
    compare: str = "exact",
) -> None:
    """Check the case, then once with every output changed.

    Floats are compared within 1e-5 unless ``compare`` says otherwise.
    """
    given, results = ({n: torch.as_tensor(np.asarray(x)) for n, x in xs.items()} for xs in (inputs, outputs))
    said = {name: f"{CLOSE if x.is_floating_point() else EXACT}" for name, x in results.items()}
    case = {"name": "made", "params": params, "inputs": list(given), "outputs": said, "compare": compare}
    if compare != "exact":
        case["outputs"] = dict.fromkeys(results, "")
    check(method, case, given | results)
    for name, x in results.items():
        wrong = x.flatten().clone()
        wrong[0] = ~wrong[0] if wrong.dtype == torch.bool else wrong[0] + 1
        with pytest.raises(AssertionError):
            check(method, case, given | results | {name: wrong.view(x.shape)})


def drawn(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def softmax(x: NDArray[Any]) -> NDArray[Any]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x: NDArray[Any]) -> NDArray[Any]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def attention_maps(q: NDArray[Any], k: NDArray[Any]) -> NDArray[Any]:
    """Products ``(B, H, L, L)`` of queries and keys ``(B, H, L, d)``, scaled."""
    return np.einsum("bhid,bhjd->bhij", q.astype(np.float64), k) / math.sqrt(q.shape[-1])


def best(scores: ArrayLike, k: int) -> list[int]:
    """The k largest, equal ones by their place."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


# ------------------------------------------------------------------------------------------------------------- FoPru


@pytest.mark.parametrize("kind", ["probs", "logits"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("heads_first", [True, False])
def test_fopru_from_queries_and_keys(kind: str, prefix: int, heads_first: bool) -> None:
    """Statement: FoPru's cases may give ``q`` and ``k`` of the scored block instead of its attention."""
    rows, cols, keep = 3, 4, 5
    q, k = (drawn(s, 2, 3, prefix + rows * cols, 4) for s in (1, 2))
    scores = attention_maps(q, k)
    scores = (softmax(scores) if kind == "probs" else scores)[:, :, prefix:, prefix:].mean(axis=1)
    received, given = scores.mean(axis=1), scores.mean(axis=2)
    chosen = ["received" if r.var(ddof=1) >= g.var(ddof=1) - 1e-15 else "given" for r, g in zip(received, given)]
    judged = {"received": received, "given": given}
    index = [sorted(best(judged[name][b], keep)) for b, name in enumerate(chosen)]
    params = {"strategy": "rank", "keep": keep, "ratio": None, "grid": [rows, cols], "score_kind": kind}
    params |= {"has_cls": True} if prefix == 1 else {"has_cls": prefix > 0, "prefix_tokens": prefix}
    outputs = {"indices": index, **{name: x.astype(np.float32) for name, x in judged.items()}}
    given_as = (lambda x: x) if heads_first else (lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)))
    params |= {"direction_chosen": chosen, "heads": 3, "head_dim": 4, "scale": 0.5}
    proves("fopru", params, {"q": given_as(q), "k": given_as(k)}, outputs)


def test_fopru_by_significance() -> None:
    """Statement: without reordering FoPru's indices come most significant first."""
    q, k = (drawn(s, 1, 2, 9, 4) for s in (3, 4))
    received = softmax(attention_maps(q, k)).mean(axis=(1, 2))
    params = {"keep": 4, "grid": [3, 3], "has_cls": False, "direction": "received", "reorder": False}
    proves("fopru", params, {"q": q, "k": k}, {"indices": [best(received[0], 4)]})


# ----------------------------------------------------------------------------------------------------------- HiPrune


def test_hiprune_from_scores() -> None:
    """Statement: a case may give every view's scores instead of queries and keys."""
    anchor, deep = np.abs(drawn(7, 1, 20)), np.abs(drawn(8, 1, 20))
    top = best(anchor[0], 1)
    core = {min(max(top[0] + step, 0), 19) for step in (0, -1, 1, -5, 5)}
    left = np.where([t in core for t in range(20)], -1, deep[0])
    kept = np.zeros((1, 20), dtype=np.uint8)
    kept[0, [*core, *best(left, 7 - len(core))]] = 1
    params = {"family": "llava", "grid": [4, 5], "has_cls": True, "views": 1, "budget_total": 7, "alpha": 0.7}
    params |= {"object_layer_1based": 9, "deep_layer_index": -2}
    proves("hiprune", params, {"score_obj": anchor, "score_deep": deep}, {"keep_mask": kept, "anchors": [top]})


# ----------------------------------------------------------------------------------------------------------- FocusUI

IMAGE, TEXT, MARKER = 90, 7, 99


def prompt(*parts: tuple[int, int] | int) -> list[int]:
    """Token ids of so many words, and of pictures of rows x columns."""
    return [i for part in parts for i in ([TEXT] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1]))]


def test_pospad_of_a_batch() -> None:
    """Statement: PosPad's cases may be whole batches: pictures of other shapes, several in a sample, padding on the
    left.
    """
    prompts = [prompt(3, (2, 4), 4), prompt(3, (4, 2), 4), prompt(2, (2, 2), 2, (2, 2), 3), prompt(3, (2, 4), 4)]
    grids = [[2, 4], [4, 2], [2, 2], [2, 2], [2, 4]]
    keeps = [{0, 1, 4, 6}, {2, 3, 4, 6}, {0, 1, 4, 6}, {0, 3, 5, 6}]  # of 8; what is dropped makes three runs each
    ids = np.array(prompts)
    batch, length = ids.shape
    scores = drawn(9, batch, 8)
    for b, keep in enumerate(keeps):
        scores[b, list(keep)] += 10
    embeds, marker, labels = drawn(10, batch, length, 3), drawn(11, 3), ids * 2
    mask = np.ones_like(ids)
    mask[1, 0] = 0
    positions = np.arange(3 * batch * length).reshape(3, batch, length)
    levels = [drawn(s, batch * 8, 3) for s in (12, 13)]
    outputs: dict[str, list[Any]] = {name: [] for name in ("keep", "stays", "ids", "embeds", "labels", "visual", "at")}
    kept_levels: list[list[Any]] = [[], []]
    for b, keep in enumerate(keeps):
        n, rows = -1, []
        for i in range(length):
            visual = ids[b, i] == IMAGE
            n += visual
            dropped = visual and n not in keep
            ends = dropped and not (i + 1 < length and ids[b, i + 1] == IMAGE and n + 1 not in keep)
            if visual and not dropped:
                for level, full in zip(kept_levels, levels):
                    level.append(full[8 * b + n])
            if not dropped or ends:
                rows.append((i, ends))
        outputs["keep"].append([t in keep for t in range(8)])
        outputs["stays"].append([i in dict(rows) for i in range(length)])
        outputs["ids"].append([MARKER if end else ids[b, i] for i, end in rows])
        outputs["embeds"].append([marker if end else embeds[b, i] for i, end in rows])
        outputs["labels"].append([-100 if end else labels[b, i] for i, end in rows])
        outputs["visual"].append([not end and ids[b, i] == IMAGE for i, end in rows])
        outputs["at"].append([i for i, _ in rows])
    assert {len(row) for row in outputs["at"]} == {14}, "the made samples keep equally many"
    at = outputs["at"]
    expected = {
        "image_keep_mask": outputs["keep"],
        "sequence_keep_mask": outputs["stays"],
        "input_ids": outputs["ids"],
        "inputs_embeds": np.array(outputs["embeds"]),
        "labels": outputs["labels"],
        "visual_pos_mask": outputs["visual"],
        "attention_mask": [mask[b, at[b]] for b in range(batch)],
        "position_ids": np.stack([positions[:, b, at[b]] for b in range(batch)], axis=1),
        **{f"deepstack_intended_{n}": np.array(level) for n, level in enumerate(kept_levels)},
    }
    params = {
        "family": "qwen3_vl",
        "visual_reduct_ratio": 0.5,
        "image_token_id": IMAGE,
        "image_drop_end_token_id": MARKER,
    }
    params |= {"n_image_tokens": 8, "n_keep": [4, 4, 4, 4], "n_markers": 12, "marker_token_id_used": MARKER}
    inputs = {"input_ids": ids, "inputs_embeds": embeds, "labels": labels, "attention_mask": mask}
    inputs |= {"position_ids": positions, "rope_delta": np.zeros((batch, 1)), "marker_embedding": marker}
    inputs |= {"image_grid_merged": grids, **{f"deepstack_{n}": level for n, level in enumerate(levels)}}
    made = {f"out.{name}": np.array(x) for name, x in expected.items()}
    given = {f"in.{name}": x for name, x in inputs.items()}
    for recorded in (scores, scores.ravel(), np.pad(scores, ((0, 0), (0, 2)))):
        proves("focusui", params, {**given, "in.patch_scores": recorded}, made)
    plain = {name: x for name, x in given.items() if name not in ("in.labels", "in.attention_mask")}
    left = {name: x for name, x in made.items() if name not in ("out.labels", "out.attention_mask")}
    one_axis = {**plain, "in.position_ids": positions[0], "in.patch_scores": scores}
    proves("focusui", {**params, "batch": batch}, one_axis, {**left, "out.position_ids": made["out.position_ids"][0]})
    wrong = {**params, "n_markers": 11}
    with pytest.raises(AssertionError, match="n_markers"):
        proves("focusui", wrong, {**given, "in.patch_scores": scores}, made)
    for other in (grids[1:], [*grids, [2, 4]]):
        with pytest.raises(goldens.UnknownParameter, match="grids"):
            proves("focusui", params, {**given, "in.image_grid_merged": other, "in.patch_scores": scores}, made)


def recorded_scorer() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Parameters, weights and inputs of the scorer on record."""
    case = next(c for c in json.loads((GOLDENS / "focusui.json").read_text())["cases"] if c["name"] == "scorer_mean")
    tensors = {n.removeprefix("scorer_mean."): x for n, x in load_file(GOLDENS / "focusui.safetensors").items()}
    return case["params"], {
        n: x for n, x in tensors.items() if n.startswith("w.") or n in ("in.image_embeds", "in.text_embeds")
    }


def enhanced(x: NDArray[Any], weights: dict[str, NDArray[Any]], heads: int) -> NDArray[Any]:
    """Section A of the specification for one modality, ``(L, D) -> (L, D)``."""
    q, k, v = np.split(x @ weights["attn.in_proj_weight"].T + weights["attn.in_proj_bias"], 3, axis=1)
    parts = []
    for head in np.split(np.arange(x.shape[1]), heads):
        parts.append(softmax(q[:, head] @ k[:, head].T / math.sqrt(len(head))) @ v[:, head])
    h = x + np.concatenate(parts, axis=1) @ weights["attn.out_proj.weight"].T + weights["attn.out_proj.bias"]
    h = (h - h.mean(axis=1, keepdims=True)) / np.sqrt(h.var(axis=1, keepdims=True) + 1e-5)
    h = h * weights["layer_norm.weight"] + weights["layer_norm.bias"]
    h = h @ weights["mlp.0.weight"].T + weights["mlp.0.bias"]
    h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
    return unit(np.tanh(h @ weights["mlp.2.weight"].T + weights["mlp.2.bias"]))


def kl(label: NDArray[Any], scores: NDArray[Any]) -> float:
    """``KL(softmax(label) || softmax(scores))`` of one picture."""
    target, found = softmax(label.astype(np.float64)), softmax(scores.astype(np.float64))
    return sum(t * (math.log(t) - math.log(f)) for t, f in zip(target, found))


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(
    ("label", "loss"), [("patch_scores_label", "loss"), ("label", "ps_loss"), ("labels", "scorer_loss")]
)
def test_focusui_scorer_with_its_loss(pooling: str, label: str, loss: str) -> None:
    """Statement: with labels a scorer's case has its training loss too; words that are masked out are not pooled."""
    params, tensors = recorded_scorer()
    weights = {n.removeprefix("w."): x.double().numpy() for n, x in tensors.items() if n.startswith("w.")}
    sides = {
        s: {n.removeprefix(s): x for n, x in weights.items() if n.startswith(s)}
        for s in ("vision_enhancer.", "text_enhancer.")
    }
    text = tensors["in.text_embeds"][0].double().numpy()
    words = np.array([True, True, False, True, True, False])
    visual = enhanced(tensors["in.image_embeds"].double().numpy(), sides["vision_enhancer."], params["num_heads"])
    cosines = visual @ enhanced(text[words], sides["text_enhancer."], params["num_heads"]).T
    scores = cosines.mean(axis=1) if pooling == "mean" else cosines.max(axis=1)
    labels = np.clip(drawn(14, 40), -1, 1)
    inputs = {**tensors, f"in.{label}": labels, "in.text_mask": words[None]}
    outputs = {"out.patch_scores": scores[None].astype(np.float32), f"out.{loss}": np.float32(kl(labels, scores))}
    proves("focusui", {**params, "text_token_pooling": pooling}, inputs, outputs)
    bfloat16 = {**params, "text_token_pooling": pooling, "dtype": "bfloat16"}
    proves("focusui", bfloat16, inputs, {"out.patch_scores": outputs["out.patch_scores"]}, "allclose atol 5e-2")


def test_focusui_loss_of_recorded_scores() -> None:
    """Statement: the loss of a batch is the mean over its pictures."""
    scores, labels = drawn(15, 2, 9), np.clip(drawn(16, 2, 9), -1, 1)
    loss = np.float32([np.mean([kl(label, row) for label, row in zip(labels, scores)])])
    for name in ("in.patch_scores", "in.scores"):
        proves("focusui", {"num_heads": 8}, {name: scores, "in.target": labels}, {"out.loss": loss})


def test_focusui_graph_without_a_box() -> None:
    """Statement: a picture without a box has weights of its graph, and no label."""
    image = np.zeros((8, 12, 3), dtype=np.uint8)
    image[4:, 8:] = 255  # of 2 x 3 blocks the last is unlike the others
    params = {"patch_size": 2, "merge_size": 2, "threshold": 2.0, "mode": "inv", "bbox": None}
    params |= {"bbox_weight": 1.0, "uigraph_weight": 0.5}
    weights = np.array([1 / 5] * 5 + [1], dtype=np.float32)
    proves("focusui", params, {"in.image": image}, {"out.uigraph_merged": weights})


# -------------------------------------------------------------------------------------------------------- GlobalCom²


def compressed(
    scores: NDArray[Any], side: int, crops: tuple[int, int], size: tuple[int, int], ratio: float, temperature: float
) -> dict[str, Any]:
    """Steps 1 to 7 of the specification for one picture of ``size`` (width, height) on ``crops`` (across, down)."""
    (across, down), (width, height) = crops, size
    cw, ch = across * side, down * side
    if width / height > cw / ch:
        pad = (ch - int(height * (cw / width))) // 2
        ys, xs = range(pad, ch - pad), range(cw)
    else:
        pad = (cw - int(width * (ch / height))) // 2
        ys, xs = range(ch), range(pad, cw - pad)
    thumb = scores[0].reshape(side, side).astype(np.float64)
    z = np.zeros(across * down)
    for i in range(side):
        for j in range(side):
            region = min(i // max(side // down, 1), down - 1) * across + min(j // max(side // across, 1), across - 1)
            z[region] += thumb[i, j]
    e = np.exp((z - z.max()) / temperature)
    sigma = e / (e.sum() + 1e-8)
    ratios = np.minimum(1, ratio * (1 + sigma - sigma.mean()))

    def stretched(i: int, n: int) -> list[tuple[int, float]]:
        at = max((i + 0.5) * side / n - 0.5, 0)
        low = min(int(at), side - 1)
        return [(low, 1 - (at - low)), (min(low + 1, side - 1), at - low)]

    found: dict[str, Any] = {"ratios": ratios, "keep_count": [], "valid_count": []}
    flat, overview, judged, kept = [], [], [], set()
    for c in range(across * down):
        place = [(y, x) for y in ys for x in xs if y // side * across + x // side == c]
        local = np.array([scores[1 + c, y % side * side + x % side] for y, x in place], dtype=np.float64)
        g = np.array(
            [
                sum(
                    thumb[i, j] * wi * wj
                    for i, wi in stretched(y - ys[0], len(ys))
                    for j, wj in stretched(x - xs[0], len(xs))
                )
                for y, x in place
            ]
        )
        t = local / max(np.linalg.norm(local), 1e-12) + g / max(np.linalg.norm(g), 1e-12)
        chosen = sorted(best(t, int(len(place) * ratios[c])))
        found["valid_count"].append(len(place))
        found["keep_count"].append(len(chosen))
        flat += [place[i][0] % side * side + place[i][1] % side for i in chosen]
        kept |= {place[i] for i in chosen}
        overview += g.tolist()
        judged += t.tolist()
    order = best(scores[0], int(side**2 * ratio))
    sequence = [(0, i) for i in sorted(order)]
    for y in ys:
        row = [(1 + y // side * across + x // side, y % side * side + x % side) for x in xs if (y, x) in kept]
        sequence += [*row, (-1, -1)]
    return {
        **found,
        "keep_flat": flat,
        "thumb_order": order,
        "global_flat": np.array(overview, dtype=np.float32),
        "score_combined": np.array(judged, dtype=np.float32),
        "seq_spatial": sequence,
    }


SIDE = 6


@pytest.mark.parametrize(
    ("crops", "size"),
    [((3, 1), (400, 100)), ((1, 3), (100, 200)), ((2, 3), (300, 300)), ((2, 2), (256, 256)), ((4, 1), (30, 60))],
)
def test_globalcom2_on_a_canvas_of_its_own(crops: tuple[int, int], size: tuple[int, int]) -> None:
    """Statement: with pinpoints "custom" the canvas is that of ``crop_grid_wh``, also where a crop is padding alone."""
    scores = drawn(17, 1 + crops[0] * crops[1], SIDE**2)
    params = {"R": 0.4, "temperature": 3.0, "side": SIDE, "image_size_wh": list(size), "score_mode": "mix"}
    params |= {"pinpoints": "custom", "crop_grid_wh": list(crops), "thumb_keep": 14}
    outputs = compressed(scores, SIDE, crops, size, 0.4, 3.0)
    assert (size != (30, 60)) or 0 in outputs["valid_count"]
    proves("globalcom2", params, {"scores": scores}, outputs)
    with pytest.raises(goldens.UnknownParameter, match="pinpoints"):
        proves("globalcom2", {**params, "pinpoints": "unheard of"}, {"scores": scores}, outputs)


def test_globalcom2_on_listed_canvases() -> None:
    """Statement: pinpoints may be listed, width first; the size of a view follows from the grid of crops."""
    scores = drawn(18, 5, SIDE**2)
    params = {"R": 0.5, "temperature": 10.0, "side": SIDE, "image_size_wh": [500, 400], "crop_grid_wh": [2, 2]}
    outputs = compressed(scores, SIDE, (2, 2), (500, 400), 0.5, 10.0)
    for canvases in ([[672, 672]], [[336, 1344], [672, 672]]):
        proves("globalcom2", {**params, "pinpoints": canvases}, {"scores": scores}, outputs)


@pytest.mark.parametrize("score", ["cls_logits", "cls_softmax", "neg_cos"])
def test_globalcom2_from_what_scores_are_made_of(score: str) -> None:
    """Statement: scores come from the class token's query and the keys, or from features where there is none."""
    q, k, features = drawn(19, 3, 2, 4), drawn(20, 3, 2, 1 + SIDE**2, 4), drawn(21, 3, SIDE**2, 5)
    logits = np.einsum("vhd,vhkd->vhk", q, k) / 2
    if score == "neg_cos":
        scores = np.stack([-unit(x) @ unit(x.mean(axis=0)) for x in features])
    else:
        scores = (logits if score == "cls_logits" else softmax(logits))[:, :, 1:].mean(axis=1)
    inputs = {"features": features} if score == "neg_cos" else {"q_cls": q, "k": k}
    params = {"R": 0.4, "temperature": 3.0, "side": SIDE, "image_size_wh": [200, 90], "score": score}
    params |= {"pinpoints": "custom", "crop_grid_wh": [2, 1]}
    outputs = compressed(scores, SIDE, (2, 1), (200, 90), 0.4, 3.0)
    proves("globalcom2", params, inputs, {**outputs, "scores": scores.astype(np.float32)})


# ----------------------------------------------------------------------------------------------------------- mergers


@pytest.mark.parametrize(("n", "k", "prefix"), [(12, 3, 0), (14, 3, 0), (17, 4, 0), (15, 4, 1), (8, 2, 0)])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("tail", ["zero", "left out"])
def test_tome_kth(n: int, k: int, prefix: int, sized: bool, tail: str) -> None:
    """Statement: of kth matching the first ``prefix + N // k`` rows count; tokens behind them, which the released code
    loses, must stay as they are, and their rows in ``assign`` mean nothing.
    """
    metric, x = drawn(22, 2, n, 4), drawn(23, 2, n, 3)
    size = np.random.default_rng(24).integers(1, 5, (2, n, 1)).astype(np.float32) if sized else np.ones((2, n, 1))
    periods = (n - prefix) // k
    rows, whole = prefix + periods, prefix + periods * k
    heads = [prefix + k * j + k - 1 for j in range(periods)]
    sources = [i for i in range(prefix, whole) if i not in heads]
    out, sizes, assign = np.zeros((2, rows, 3)), np.zeros((2, rows, 1)), np.zeros((2, n), dtype=np.int64)
    dst = np.zeros((2, len(sources)), dtype=np.int64)
    for b in range(2):
        for i in range(whole):
            j = i if i < prefix else prefix + heads.index(i) if i in heads else None
            if j is None:
                dst[b, sources.index(i)] = best([unit(metric[b, i]) @ unit(metric[b, h]) for h in heads], 1)[0]
                j = prefix + dst[b, sources.index(i)]
            assign[b, i] = j
            out[b, j] += x[b, i] * size[b, i]
            sizes[b, j] += size[b, i]
    out = (out / sizes).astype(np.float32)
    outputs = {"x_out": out, "size_out": sizes.astype(np.float32), "dst_pos": dst}
    outputs |= {"src_pos": [range(len(sources))] * 2, "assign": assign if tail == "zero" else assign[:, :whole]}
    outputs["x_unmerged"] = np.stack([out[b, assign[b, :whole]] for b in range(2)])
    inputs = {"metric": metric, "x": x, **({"size": size} if sized else {})}
    proves(
        "tome",
        {"kind": "kth", "k": k, "class_token": prefix == 1, "r_effective": n - rows - (n - whole)},
        inputs,
        outputs,
    )


def test_tome_kth_tail_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statement: a kth matching that touches the tokens behind the last period fails."""

    def shorter(x: Tensor, *places: Tensor) -> tuple[Tensor, Tensor]:
        merged, sizes = goldens_merge(x, *places)
        return merged * torch.cat([torch.ones(merged.shape[1] - 1), torch.tensor([2.0])])[None, :, None], sizes

    goldens_merge = goldens.merge_tokens
    monkeypatch.setattr(goldens, "merge_tokens", shorter)
    with pytest.raises(AssertionError, match="tokens behind the last of 3 periods"):
        goldens.run_case("tome", {"kind": "kth", "k": 3}, {"metric": torch.randn(1, 10, 4)})


def merged_pairs(
    x: NDArray[Any], size: NDArray[Any], r: int, prefix: int
) -> tuple[list[list[int]], list[int], list[int]]:
    """Bipartite matching of ``x (N, C)``: groups of rows in the released order without class token; positions."""
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    cosines = np.array([[unit(x[i]) @ unit(x[j]) for j in b] for i in a])
    cosines[: (prefix + 1) // 2] = -np.inf
    ranked = best(cosines.max(axis=1), len(a))
    src, unm = ranked[:r], ranked[r:]
    unm = sorted(unm) if prefix else unm
    groups = [[a[i]] for i in unm] + [[j] for j in b]
    for i in src:
        groups[len(unm) + int(cosines[i].argmax())].append(a[i])
    return groups, unm, src


def averaged(x: NDArray[Any], size: NDArray[Any], groups: list[list[int]], weighting: str) -> dict[str, Any]:
    """Rows of the groups, whose first member is the target."""
    weight = {"size": lambda g: size[g], "mean": lambda g: np.ones(len(g)), "prune": lambda g: np.arange(len(g)) == 0}
    out = [(weight[weighting](g)[:, None] * x[g]).sum(axis=0) / weight[weighting](g).sum() for g in groups]
    assign = [next(i for i, g in enumerate(groups) if t in g) for t in range(len(x))]
    return {
        "x_out": np.array([out], dtype=np.float32),
        "size_out": np.array([[[size[g].sum()] for g in groups]], dtype=np.float32),
        "assign": np.array([assign]),
    }


ROWS = (
    "indices: exact order; x_out/size_out allclose atol 1e-5; another row order must match after mapping through assign"
)


@pytest.mark.parametrize(
    ("more", "weighting"), [({}, "size"), ({"weighted": False}, "mean"), ({"mode": "prune"}, "prune")]
)
def test_pitome_rows_in_another_order(more: dict[str, Any], weighting: str) -> None:
    """Statement: rows may leave in another order than recorded, if the groups are the same; sources keep their order.
    Groups may become plain means or their targets, too.
    """
    x = drawn(25, 12, 5)
    size = np.random.default_rng(26).integers(1, 4, 12).astype(np.float32)
    groups, unm, src = merged_pairs(x, size, 3, 0)
    assert unm != sorted(unm), "the released order is another one than ours"
    params = {"kind": "layer", "variant": "bsm", "ratio": 0.75, "r": 3, "margin": 0.5, "class_token": False, **more}
    outputs = {**averaged(x, size, groups, weighting), "unm_pos": [unm], "src_pos": [src]}
    inputs = {"metric": x[None], "x": x[None], "size": size[None, :, None]}
    proves("pitome", params, inputs, outputs, ROWS)
    with pytest.raises(goldens.UnknownParameter, match="mode"):
        proves("pitome", {**params, "mode": "unheard of"}, inputs, outputs, ROWS)


@pytest.mark.parametrize("prefix", [0, 1])
def test_tome_with_a_ratio(prefix: int) -> None:
    """Statement: a keep ratio counts the class token, and no block loses more than half."""
    x = drawn(27, 11, 5)
    for ratio, r in ((0.8, 2), (0.2, (11 - prefix) // 2)):
        groups, unm, src = merged_pairs(x, np.ones(11), r, prefix)
        outputs = {**averaged(x, np.ones(11), groups, "size"), "unm_pos": [unm], "src_pos": [src]}
        params = {"kind": "layer", "ratio": ratio, "r_effective": r, "class_token": prefix == 1}
        proves("tome", params, {"metric": x[None]}, outputs, ROWS)


def test_tome_chain_with_blocks_that_merge_nothing() -> None:
    """Statement: a block that removes nothing leaves rows and sizes as they are."""
    x = drawn(28, 10, 5)
    groups, *_ = merged_pairs(x, np.ones(10), 4, 0)
    params = {"kind": "chain", "r": [0, 4, 0], "metric": "the current tokens", "token_counts": [10, 6, 6]}
    proves(
        "tome",
        params,
        {"x": x[None]},
        averaged(x, np.ones(10), groups, "size"),
        "exact; x_out/size_out allclose atol 1e-5",
    )


# ------------------------------------------------------------------------------------------------- ToDRE, baselines


def test_todre_from_the_whole_attention() -> None:
    """Statement: the class token's attention may come as a map, or as queries and keys."""
    features = drawn(29, 9, 4)
    q, k = (drawn(s, 2, 10, 4) for s in (30, 31))
    attn = softmax(attention_maps(q[None], k[None])[0])
    pivot = best(attn.mean(axis=0)[0, 1:], 1)[0]
    order = [pivot]
    for _ in range(3):
        summed = [
            math.inf if i in order else sum(unit(features)[i] @ unit(features)[j] for j in order) for i in range(9)
        ]
        order.append(int(np.argmin(summed)))
    params = {"stage": 1, "keep": 4, "mode": "max_sum", "pivot": "cls", "pivot_index": pivot}
    for inputs in ({"attn": attn.astype(np.float32)}, {"q": q, "k": k}):
        proves("todre", params, {"features": features, **inputs}, {"order": order, "indices": sorted(order)})


def test_fastv_from_queries_and_keys() -> None:
    """Statement: the last row's attention may come from queries and keys."""
    q, k = (drawn(s, 2, 12, 4) for s in (32, 33))
    last = softmax(attention_maps(q[None], k[None])[0, :, -1]).mean(axis=0)[3:11]
    kept = [0, 1, 2, *(3 + i for i in sorted(best(last, 4))), 11]
    params = {"method": "fastv", "R": 0.5, "image_start": 3, "num_visual": 8, "keep": 4}
    proves("baselines", params, {"q": q, "k": k}, {"keep_positions": kept})


def test_visionzip_from_attention() -> None:
    """Statement: VisionZip's block may give its attention beside the keys."""
    q, k, hidden = drawn(34, 1, 2, 10, 4), drawn(35, 1, 2, 10, 4), drawn(36, 1, 10, 3)
    attn = softmax(attention_maps(q, k))
    dominant = [0, *(1 + i for i in sorted(best(attn[0, :, 0, 1:].mean(axis=0), 3)))]
    rest = [i for i in range(10) if i not in dominant]
    metric = unit(k[0].mean(axis=0))
    targets = rest[:: len(rest) // 2][:2]
    tokens = list(hidden[0, dominant])
    members: dict[int, list[int]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: metric[i] @ metric[t])].append(i)
    tokens += [hidden[0, t] + hidden[0, members[t]].sum(axis=0) / max(1, len(members[t])) for t in targets]
    params = {"method": "visionzip", "dominant": 4, "contextual": 2}
    inputs = {"attn": attn.astype(np.float32), "k": k, "hidden": hidden}
    proves("baselines", params, inputs, {"tokens": np.array([tokens]), "dominant": [dominant]})


def test_cdpruner_without_text() -> None:
    """Statement: without text CDPruner is a plain determinantal process."""
    features = drawn(37, 1, 8, 4)
    x = unit(features[0].astype(np.float64))
    kernel, chosen = x @ x.T, []
    for _ in range(3):
        volume = {j: np.linalg.det(kernel[np.ix_([*chosen, j], [*chosen, j])]) for j in range(8) if j not in chosen}
        chosen.append(best([round(volume.get(j, -1), 9) for j in range(8)], 1)[0])
    inputs = {"features": features, "image_embeds": drawn(38, 1, 8, 3)}
    proves("baselines", {"method": "cdpruner", "keep": 3}, inputs, {"indices": [sorted(chosen)]})


# ------------------------------------------------------------------------------------------------------------- QuoTA


def test_quota_with_a_cap_that_spreads() -> None:
    """Statement: a case may name its cap, and state the budget alone; newlines are read only where there is a grid."""
    scores, tokens = np.array([0.9, 0.5, 0.1]), drawn(39, 3, 9, 2)
    weights = scores**2 / (scores**2).sum()
    cap = 9 / 15  # 9 tokens of a frame in a budget of 15
    spare = weights[0] - cap
    weights = np.array([cap, *(weights[1:] + spare * weights[1:] / weights[1:].sum())])
    budgets = [int(15 * w + 1e-9) for w in weights]
    kept = [tokens[t, int(i)] for t, b in enumerate(budgets) for i in np.linspace(0, 8, b)]
    params = {
        "version": "linspace",
        "side": 3,
        "target_total": 15,
        "cap": "waterfill",
        "cap_weight": cap,
        "pool_before": False,
    }
    inputs = {"in.frame_scores": scores, "in.tokens": tokens, "in.newline": drawn(40, 2)}
    outputs = {"out.weights": weights, "out.budgets": budgets, "out.counts": budgets, "out.tokens": np.array(kept)}
    proves("quota", params, inputs, outputs)


# -------------------------------------------------------------------------------------------------------- TransPrune


@pytest.mark.parametrize("direction", ["1-cos (signed)", "1-|cos| (abs)"])
@pytest.mark.parametrize("scope", ["all tokens of the sequence", "image tokens only"])
def test_transprune_turns(direction: str, scope: str) -> None:
    """Statement: turns are signed or not, and weigh relative to the whole sequence or to the image."""
    states = {
        f"{block}_{end}": drawn(41 + i, 7, 4)
        for i, (block, end) in enumerate([("attn", "in"), ("attn", "out"), ("ffn", "in"), ("ffn", "out")])
    }
    outputs = {}
    for block in ("attn", "ffn"):
        before, after = (states[f"{block}_{end}"].astype(np.float64) for end in ("in", "out"))
        cos = (unit(before) * unit(after)).sum(axis=1)
        turn = np.exp(1 - (abs(cos) if "abs" in direction else cos))
        total = turn.sum() if "sequence" in scope else turn[2:5].sum()
        outputs[f"ttv_{block}"] = np.linalg.norm(after, axis=1) / np.linalg.norm(before, axis=1) * turn / total
    outputs["ttv"] = outputs["ttv_attn"] + outputs["ttv_ffn"]
    params = {"tokens": 7, "dim": 4, "direction": direction, "softmax_over": scope, "image_start": 2, "num_image": 3}
    proves("transprune", params, states, {name: x.astype(np.float32) for name, x in outputs.items()})
    with pytest.raises(goldens.UnknownParameter, match="speaks of none"):
        proves("transprune", {**params, "softmax_over": "unheard of"}, states, outputs)


@pytest.mark.parametrize(("ratio", "keep"), [(0.5, 3), (1.0, 6)])
@pytest.mark.parametrize("layers", [0, 2])
def test_transprune_step_with_shared_keys(ratio: float, keep: int, layers: int) -> None:
    """Statement: key heads may be shared, a step may keep all, and no transition may have been seen yet."""
    q, k, seen = drawn(45, 4, 3, 4), drawn(46, 2, 11, 4), np.abs(drawn(47, 2, 11))
    paid = np.zeros(11)
    for h in range(4):
        for r in range(3):
            row = softmax(k[h // 2, : 9 + r] @ q[h, r].astype(np.float64) / 2)
            paid[: 9 + r] += row / 12
    image = slice(2, 8)
    score = paid[image] / (paid[image].sum() + 1e-8)
    if layers:
        score = score + seen.sum(axis=0)[image] / (seen.sum(axis=0)[image].sum() + 1e-8)
    params = {"image_start": 2, "num_image": 6, "original_num_image": 6, "ratio": ratio, "keep": keep, "causal": True}
    inputs = {"q_text": q, "k_all": k, **({"ttv_layers": seen} if layers else {})}
    outputs = {"score": score.astype(np.float32), "keep": sorted(best(score, keep))}
    proves("transprune", params, inputs, outputs)


# ------------------------------------------------------------------------------------------------------ CoreMatching


def counted(act: NDArray[Any], rho: float) -> list[int]:
    """Section "mode paper", steps 2 and 3."""
    k = int(rho * (act > 0).sum() / len(act))
    return [sum(n in best(row, k) for row in act) for n in range(act.shape[1])]


def at_knee(counts: list[int], keeps: str) -> tuple[int, int, list[int]]:
    """Place and value of the knee, and which counts pass it."""
    curve, last = sorted(counts, reverse=True), len(counts) - 1
    distance = [abs(last * (y - curve[0]) - i * (curve[-1] - curve[0])) for i, y in enumerate(curve)]
    place = distance.index(max(distance))
    value = curve[place]
    return place, value, [i for i, c in enumerate(counts) if c > value or (c == value and keeps == ">=")]


TIED = (
    "neuron_counts exact; core exact set (if tie_at_boundary, any set with the same multiset of counts is legal); "
    "counts exact; keep exact set"
)


def tied() -> tuple[NDArray[np.float32], list[int], list[int], list[int]]:
    """Activations, counts, our core neurons and another legal choice."""
    act = drawn(48, 12, 20)
    counts = counted(act, 0.3)
    ours = best(counts, 8)
    least = min(counts[n] for n in ours)
    out = [n for n in range(20) if counts[n] == least and n not in ours]
    assert out, "the made counts tie at the boundary"
    gone = next(n for n in ours if counts[n] == least)
    return act, counts, sorted(ours), sorted([*(n for n in ours if n != gone), out[-1]])


@pytest.mark.parametrize("choice", ["ours", "other"])
@pytest.mark.parametrize("rule", [">=", ">"])
def test_corematching_ties(choice: str, rule: str) -> None:
    """Statement: of neurons with equal counts at the boundary any may be core, and tokens follow the recorded ones."""
    act, counts, ours, other = tied()
    core = ours if choice == "ours" else other
    matches = [sum(act[t, n] > 0 for n in core) for t in range(2, 11)]
    place, value, keep = at_knee(matches, rule)
    params = {"rho": 0.3, "beta": 0.4, "budget": 8, "selected": 8, "tie_at_boundary": True, "tie_rule": "any"}
    params |= {
        "image_start": 2,
        "num_image": 9,
        "knee_index": place,
        "knee_value": value,
        "rule": f"keep if count {rule} knee value",
    }
    outputs = {"neuron_counts": counts, "core": core, "counts": matches, "keep": keep}
    check_tied(params, act, outputs)
    with pytest.raises(goldens.UnknownParameter, match="unheard of"):
        check_tied({**params, "rule": "unheard of"}, act, outputs)


def check_tied(params: dict[str, Any], act: NDArray[Any], outputs: dict[str, Any]) -> None:
    case = {"name": "made", "params": params, "inputs": ["act"], "outputs": dict.fromkeys(outputs, ""), "compare": TIED}
    check("corematching", case, {"act": torch.as_tensor(act), **{n: torch.tensor(x) for n, x in outputs.items()}})


def test_corematching_ties_are_judged() -> None:
    """Statement: another size, a neuron twice, other counts, and any other set where nothing ties, all fail."""
    act, counts, _, other = tied()
    params = {"rho": 0.3, "beta": 0.4, "tie_at_boundary": True}
    check_tied(params, act, {"neuron_counts": counts, "core": other})
    lowest = int(np.argmin(counts))
    for wrong in (other[:-1], [other[0], *other[:-1]], [lowest, *other[1:]]):
        with pytest.raises(AssertionError, match="core neurons"):
            check_tied(params, act, {"neuron_counts": counts, "core": wrong})
    with pytest.raises(AssertionError):
        check_tied({**params, "tie_at_boundary": False}, act, {"neuron_counts": counts, "core": other})


def test_corematching_budget_of_tokens() -> None:
    """Statement: a budget that is not that of the neurons is one of tokens."""
    act, _, ours, _ = tied()
    matches = [sum(act[t, n] > 0 for n in ours) for t in range(2, 11)]
    place, value, _ = at_knee(matches, ">=")
    params = {
        "rho": 0.3,
        "beta": 0.4,
        "budget": 5,
        "image_start": 2,
        "num_image": 9,
        "knee_index": place,
        "knee_value": value,
    }
    proves("corematching", params, {"act": act}, {"counts": matches, "keep": sorted(best(matches, 5))})


@pytest.mark.parametrize("rule", ["keep if count > knee value (strict)", "keep if count >= knee value (notebook)"])
def test_corematching_released_rules(rule: str) -> None:
    """Statement: the released selection keeps the knee itself or not, as the case says."""
    act, cache = drawn(49, 20, 16), drawn(50, 2, 20, 3)
    matches = [sum((act[t] > 0) & (act[-5] > 0)) for t in range(3, 13)]
    place, value, keep = at_knee(matches, ">=" if ">=" in rule else ">")
    left = cache.copy()
    left[:, [3 + i for i in range(10) if i not in keep]] = 0
    params = {"image_start": 3, "num_image": 10, "seq": 20, "neurons": 16, "reference_row": 15, "rule": rule}
    params |= {
        "knee_index": place,
        "knee_value": float(value),
        "cache_mode": "zero",
        "distance": "unsigned, first argmax",
    }
    inputs = {"act": act, "k_in": cache, "v_in": cache}
    proves("corematching", params, inputs, {"counts": matches, "keep": keep, "k_out": left, "v_out": left})
