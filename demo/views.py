"""What the app shows, as HTML: answers, the drawing with its tokens, comparisons."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image, ImageOps

from foveate.adapters.drawing import Facts, draw, facts, heat_colours, panels
from foveate.adapters.trace import ImageTrace
from foveate.demo.engine import Answer
from foveate.demo.examples import Example
from foveate.demo.media import Clip, Media, frames_of
from foveate.pruners import PRUNERS, Pruner, create

WIDTH = 768

_HINT = "Point at a token, or move with the arrow keys, to see what became of it."
_OUTDATED = (
    '<p class="fv-note fv-outdated">This is the result of the picture before; '
    "press <strong>Run</strong> for the new one.</p>"
)
_KNOWS = {
    "shapes-llava": "coloured shapes and two-letter codes, by six kinds of question",
    "shapes-next": "coloured shapes and two-letter codes in pictures twice as wide as high, by six kinds of question",
    "shapes-qwen": "where to click on small screens, and what shows up in short clips",
}
_LEGENDS = {
    "kept": "kept tokens are clear, dropped ones dark and grey",
    "scores": '<span class="ramp" role="img" aria-label="from dark violet to yellow"></span> low to high '
    "· kept tokens outlined",
    "groups": "merged tokens share a colour · the dot marks the token that speaks for them",
}


def answers(unpruned: Answer, pruned: Answer, pruner: Pruner, outdated: bool = False) -> str:
    """Both answers side by side, with what they cost; ``outdated``: they are about an earlier picture."""
    return (
        (_OUTDATED if outdated else "")
        + '<div class="fv-answers">'
        + _card("All tokens", unpruned, unpruned, "", "unpruned")
        + _card(f"With {pruner.name}", pruned, unpruned, _mark(unpruned, pruned), "pruned")
        + "</div>"
    )


def _mark(unpruned: Answer, pruned: Answer) -> str:
    same = unpruned.text == pruned.text
    return f'<span class="fv-same {"yes" if same else "no"}">{"same answer" if same else "another answer"}</span>'


def _card(title: str, answer: Answer, whole: Answer, mark: str, kind: str) -> str:
    share = _share(answer, whole)
    return (
        f'<section class="fv-card {kind}"><h3>{escape(title)}{mark}</h3>'
        f'<p class="said">{escape(answer.text) or "(nothing)"}</p>'
        f'<p class="facts">{_cost(answer, whole)}</p>'
        f'<div class="fv-bar" role="img" aria-label="{share:.0%} of the visual tokens"><i '
        f'style="width:{share:.1%}"></i></div>'
        "</section>"
    )


def _share(answer: Answer, whole: Answer) -> float:
    return answer.mean_tokens / max(whole.mean_tokens, 1e-9)


def _cost(answer: Answer, whole: Answer) -> str:
    return (
        f"<b>{_count(answer.mean_tokens)}</b> visual tokens per layer ({_share(answer, whole):.0%}) · "
        f"{_seconds(answer.seconds)}{_scoring(answer)}"
    )


def _scoring(answer: Answer) -> str:
    return f" (scores of the frames: {_seconds(answer.scoring)})" if answer.scoring else ""


def figure(trace: ImageTrace, media: Media, show: str, layer: int) -> str:
    """The drawing, with everything that ``tokens.js`` needs to answer questions about tokens."""
    known = facts(trace, layer)
    pictures = frames_of(media)
    drawing = draw(trace, pictures, show=show, layer=layer, width=WIDTH)
    kept, total = int(known.kept.sum()), trace.layout.size
    width, height = drawing.size
    seen = f"Decoder layer {layer} sees" if progressive(trace) else "The decoder sees"
    caption = f"<b class='fv-count'>{kept} of {total}</b> tokens ({kept / total:.0%})"
    data = escape(json.dumps(_tokens(trace, known, layer, drawing.size, media), separators=(",", ":"), allow_nan=False))
    return (
        f'<figure class="fv-figure" data-tokens="{data}">'
        f"<figcaption><span>{seen} {caption}</span><span "
        f'class="legend">{_LEGENDS[show]}</span>{_cropped(trace, pictures)}'
        "</figcaption>"
        f'<div class="fv-stage" tabindex="0" role="group" aria-label="Picture with {kept} of {total} tokens kept; '
        f'arrow keys move from token to token"><img src="{data_url(drawing)}" alt="" width="{width}" height="{height}">'
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true"></svg></div>'
        f'<p class="fv-token" aria-live="polite" data-hint="{_HINT}">{_HINT}</p></figure>'
    )


def _cropped(trace: ImageTrace, pictures: Image.Image | Sequence[Image.Image]) -> str:
    oblong = isinstance(pictures, Image.Image) and pictures.width != pictures.height
    return '<span class="legend">the model sees only the middle square</span>' if trace.centre_crop and oblong else ""


def _tokens(trace: ImageTrace, known: Facts, layer: int, size: tuple[int, int], media: Media) -> dict:
    where = panels(trace.layout, WIDTH, len(media.frames) if isinstance(media, Clip) else None)
    return {
        "size": size,
        "layer": layer,
        "panels": [
            {
                "title": panel.title if len(where) > 1 else "",
                "x": panel.box[0],
                "y": panel.box[1],
                "cell": panel.cell,
                "rows": panel.tokens.shape[0],
                "cols": panel.tokens.shape[1],
                "first": int(panel.tokens[0, 0]),
            }
            for panel in where
        ],
        "left": known.left.tolist(),
        "scores": None if np.isnan(known.scores).all() else [_rounded(x) for x in known.scores.tolist()],
        "owner": None if known.owner is None else known.owner.tolist(),
        "markers": np.flatnonzero(known.markers).tolist(),
    }


def views(trace: ImageTrace) -> list[str]:
    """What there is to show of a trace."""
    known = facts(trace, start_layer(trace))
    possible = ["kept"]
    if not np.isnan(known.scores).all():
        possible.append("scores")
    if known.owner is not None:
        possible.append("groups")
    return possible


def progressive(trace: ImageTrace) -> bool:
    """Whether the decoder's layers see different tokens."""
    return len(set(trace.tokens_per_layer)) > 1


def start_layer(trace: ImageTrace) -> int:
    """The layer to show first: that before which the first stage acts."""
    return trace.stages[0].layer if trace.stages else 0


def comparison(media: Media, unpruned: Answer, rows: Sequence[tuple[Pruner, Answer]]) -> str:
    """Methods in a grid, and which share of their tokens each two have in common."""
    cards = "".join(_compared(media, unpruned, pruner, answer) for pruner, answer in rows)
    return (
        f'<p class="fv-note">Without a method the answer is <strong>{escape(unpruned.text)}</strong>, with '
        f"{_count(unpruned.mean_tokens)} visual tokens per layer in {_seconds(unpruned.seconds)}.</p>"
        f'<div class="fv-grid">{cards}</div>{_agreement(rows)}'
    )


def _compared(media: Media, unpruned: Answer, pruner: Pruner, answer: Answer) -> str:
    (trace,) = answer.trace.images
    layer = start_layer(trace)
    kept = len(trace.kept_at(layer))
    return (
        f'<article class="fv-card"><img src="{data_url(draw(trace, frames_of(media), layer=layer, width=384))}" '
        f'alt="{escape(pruner.name)}: {kept} of {trace.layout.size} tokens kept"><div '
        f'class="text"><h3>{escape(pruner.name)}'
        f'{_mark(unpruned, answer)}</h3><p class="said">{escape(answer.text) or "(nothing)"}</p>'
        f'<p class="facts">{_cost(answer, unpruned)}</p></div></article>'
    )


def overlap(rows: Sequence[tuple[Pruner, Answer]]) -> np.ndarray:
    """Intersection over union of the tokens that each two methods keep (after their first stage)."""
    kept = []
    for _, answer in rows:
        (trace,) = answer.trace.images
        kept.append(set(trace.kept_at(start_layer(trace)).tolist()))
    return np.array([[len(a & b) / max(len(a | b), 1) for b in kept] for a in kept])


def _agreement(rows: Sequence[tuple[Pruner, Answer]]) -> str:
    if len({answer.trace.images[0].layout for _, answer in rows}) > 1:
        return '<p class="fv-note">The methods saw pictures of different sizes, so their tokens cannot be compared.</p>'
    table = overlap(rows)
    names = [escape(pruner.name) for pruner, _ in rows]
    colours = heat_colours(table).round().astype(int)
    lines = []
    for name, values, shades in zip(names, table, colours):
        cells = []
        for value, shade in zip(values, shades):
            ink = "#101218" if shade @ (0.299, 0.587, 0.114) > 120 else "#ffffff"
            cells.append(f'<td style="background:rgb({",".join(map(str, shade))});color:{ink}">{value:.2f}</td>')
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<h3 class="fv-h">Agreement</h3><p class="fv-note">Kept tokens that two methods have in common, as a share of '
        "all that "
        "either keeps (intersection over union).</p>"
        f'<div class="fv-scroll"><table class="fv-table"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def examples(known: Sequence[Example]) -> str:
    """A button with a small picture for each example."""
    buttons = []
    for index, example in enumerate(known):
        media = example.make()
        moving = isinstance(media, Clip)
        picture = ImageOps.fit(media.frames[len(media.frames) // 2] if moving else media, (160, 160))
        name = escape(example.name)
        buttons.append(
            f'<button type="button" data-index="{index}" aria-label="Example: {name}">'
            f'<img src="{data_url(picture)}" alt=""><span>{"▶ " if moving else ""}{name.split()[-1]}</span></button>'
        )
    return f'<div class="fv-examples" role="group" aria-label="Examples">{"".join(buttons)}</div>'


def about(name: str) -> str:
    """A method in two lines."""
    told = PRUNERS[name] if name in PRUNERS else create(name)
    return (
        f'<p class="fv-note"><strong>{escape(told.title)}</strong><br>{escape(told.paper)}'
        f"{' · ' + escape(told.cost) if told.cost else ''}</p>"
    )


def data_url(picture: Image.Image) -> str:
    """The picture as a ``data:`` URL, PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=4)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _rounded(x: float) -> float | None:
    return float(f"{x:.4g}") if np.isfinite(x) else None


def _count(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


def _seconds(x: float) -> str:
    return f"{x * 1e3:.0f} ms" if x < 1 else f"{x:.1f} s"


def text_url(text: str, kind: str) -> str:
    """The text as a ``data:`` URL of media type ``kind``."""
    return f"data:{kind};base64," + base64.b64encode(text.encode()).decode()


def refused(methods: Mapping[str, str]) -> str:
    """Methods that the model cannot serve, and why."""
    if not methods:
        return ""
    told = ", ".join(f"{escape(name)}: {escape(why)}" for name, why in methods.items())
    return f'<p class="fv-note">Not on this model: {told}</p>'


def model_note(name: str) -> str:
    """What to expect of a model."""
    if name not in _KNOWS:
        return f'<p class="fv-note">Model: {escape(name)}.</p>'
    return (
        f'<p class="fv-note">Model: {escape(name)}, which is very small and knows only {_KNOWS[name]}. On anything '
        "else see which tokens a method keeps, and expect no sensible answer; <code>foveate demo --model NAME</code> "
        "takes a larger model.</p>"
    )
