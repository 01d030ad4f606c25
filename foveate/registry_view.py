"""What ``foveate list`` and ``foveate show`` print: one card per registered method, read off its class."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foveate.errors import FoveateError
from foveate.pruners import PRUNERS, Hook, ModelInfo, Pruner, Stage, find

# A method may act differently on different models, so a card shows it on two that differ in all that matters.
EXAMPLES: dict[str, ModelInfo] = {
    "class token, one-axis positions (CLIP tower, LLaVA)": ModelInfo(family="llava", tower="CLIPVisionModel"),
    "no class token, m-RoPE (Qwen2.5-VL)": ModelInfo(
        family="qwen2_5_vl",
        tower="Qwen2_5_VisionTransformerPretrainedModel",
        encoder_layers=32,
        feature_layer=31,
        class_token=False,
        decoder_layers=28,
        mrope=True,
        full_attention=(7, 15, 23, 31),
    ),
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method; ``default`` is its text, None where the method has none."""

    name: str
    type: str
    default: str | None
    doc: str


@dataclass(frozen=True)
class StageCard:
    """Where a stage acts (``"llm_layer 2"``) and what it reads (signal texts)."""

    hook: str
    signals: tuple[str, ...]
    positions: str | None


@dataclass(frozen=True)
class Card:
    """Everything that can be said about a method without a model.

    Attributes:
        stages: by model (a key of :data:`EXAMPLES`): the stages with default parameters, or why there are none.
    """

    name: str
    class_name: str
    title: str
    paper: str
    doc: str
    parameters: tuple[Parameter, ...]
    stages: dict[str, tuple[StageCard, ...] | str]
    families: tuple[str, ...]
    adaptive: bool
    cost: str

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hook points on any of the example models, without layer numbers, in order of first use."""
        known = [s.hook for stages in self.stages.values() if not isinstance(stages, str) for s in stages]
        return tuple(dict.fromkeys(hook.partition(" ")[0] for hook in known))

    @property
    def inside_decoder(self) -> bool:
        """Whether tokens leave between decoder layers on any of the example models."""
        return Hook.LLM_LAYER.value in self.hooks

    def as_json(self) -> dict[str, Any]:
        """Everything in plain types, as ``foveate show --json`` prints it."""
        return dataclasses.asdict(self)


def cards() -> list[Card]:
    """The cards of all methods, by name."""
    return [card(name) for name in sorted(PRUNERS)]


def card(name: str) -> Card:
    """The card of the method called ``name``, in any case.

    Raises:
        UnknownNameError: there is none; the message suggests the nearest.
    """
    cls = find(name if name in PRUNERS else name.lower())
    doc, docs = split_doc(inspect.cleandoc(cls.__doc__ or ""))
    file = inspect.getmodule(cls)
    if file and file.__doc__ and sum(other.__module__ == cls.__module__ for other in PRUNERS.values()) == 1:
        doc = inspect.cleandoc(file.__doc__)  # a file of its own is introduced at its top
    parameters = _parameters(cls, docs)
    method, reason = _default_method(cls, parameters)
    return Card(
        name=cls.name,
        class_name=cls.__name__,
        title=cls.title,
        paper=cls.paper,
        doc=_reflow(doc),
        parameters=parameters,
        stages={label: _stages(method, model) if method else reason for label, model in EXAMPLES.items()},
        families=tuple(cls.families),
        adaptive=(method or cls).adaptive is True,
        cost=cls.cost,
    )


_SECTION = re.compile(r"^(Args|Attributes|Parameters):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+(?:, \w+)*)(?: \([^)]*\))?: ?(.*)$")  # "keep: …", "keep (float): …", "width, height: …"


def split_doc(doc: str) -> tuple[str, dict[str, str]]:
    """A cleaned docstring without its ``Args:`` (or ``Attributes:``) section, and that section's entries by name."""
    heading = _SECTION.search(doc)
    if heading is None:
        return doc, {}
    lines = doc[heading.end() :].lstrip("\n").split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    entries: dict[str, list[str]] = {}
    for line in inspect.cleandoc("\n" + "\n".join(lines[:end])).split("\n"):
        entry = _ENTRY.match(line)
        if entry:
            entries[entry[1]] = [entry[2]]
        elif entries:
            entries[next(reversed(entries))].append(line.strip())
    rest = "\n\n".join(part for part in (doc[: heading.start()].strip(), "\n".join(lines[end:]).strip()) if part)
    texts = {names: plain(" ".join(filter(None, text))) for names, text in entries.items()}
    return rest, {name: text for names, text in texts.items() for name in names.split(", ")}


def _reflow(doc: str) -> str:
    """``doc`` with every plain paragraph on one line, for a terminal of any width to wrap; lists stay as they are."""
    paragraphs = [
        part if re.search(r"^(\s|[-*]\s|\d+\.\s)", part, re.MULTILINE) else part.replace("\n", " ")
        for part in doc.split("\n\n")
    ]
    return plain("\n\n".join(paragraphs))


def plain(doc: str) -> str:
    """A docstring's text without its Sphinx markup: roles go, code keeps one backtick."""
    return re.sub(r":\w+:(?=`)", "", doc).replace("``", "`")


def _prose(text: str) -> Text:
    """``text`` with the code in backticks set off by a style."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner is one to print
        return Text(text)
    return Text.assemble(*((f"`{part}`", "cyan") if i % 2 else part for i, part in enumerate(parts)))


def _parameters(cls: type[Pruner], docs: dict[str, str]) -> tuple[Parameter, ...]:
    try:
        types = {name: _type_text(kind) for name, kind in typing.get_type_hints(cls).items()}
    except NameError:  # a type that is imported for type checkers only: its source text will do
        types = {}
    return tuple(
        Parameter(field.name, types.get(field.name, str(field.type)), _default(field), docs.get(field.name, ""))
        for field in dataclasses.fields(cls)
        if field.init
    )


def _type_text(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return value_text(field.default_factory())
    return None if field.default is dataclasses.MISSING else value_text(field.default)


def value_text(value: object) -> str:
    """``repr``, but a float that is a simple fraction and no short decimal reads as one: ``1/9``."""
    if isinstance(value, float) and len(repr(value)) > 8:
        fraction = Fraction(value).limit_denominator(1000)
        return str(fraction) if float(fraction) == value else f"{value:.6g}"
    return repr(value)


def _default_method(cls: type[Pruner], parameters: tuple[Parameter, ...]) -> tuple[Pruner | None, str]:
    """The method with default parameters, or None and the reason why there is none."""
    required = ", ".join(p.name for p in parameters if p.default is None)
    if required:
        return None, f"depends on {required}"
    try:
        return cls(), ""
    except FoveateError as error:
        return None, f"depends on its parameters: {error}"


def _stages(method: Pruner, model: ModelInfo) -> tuple[StageCard, ...] | str:
    try:
        return _folded(method.stages(model))
    except FoveateError as error:
        return f"not on this model: {error}"


def _folded(stages: Iterable[Stage]) -> tuple[StageCard, ...]:
    """A card per stage; a run of vision blocks or MLPs that read the same, each in its own layer, becomes one,
    ``"vit_block 0 .. 22"``."""
    cards: list[StageCard] = []
    # of the run so far: its last layer, and how its card would look without layers
    last: tuple[int, StageCard] | None = None
    for stage in stages:
        card = _stage(stage)
        signals = tuple(re.sub(rf"\(layer={stage.layer}\b", "(layer=…", text) for text in card.signals)
        alike = dataclasses.replace(card, hook=stage.hook.value, signals=signals)
        if stage.hook in (Hook.VIT_BLOCK, Hook.LLM_MLP) and last == (stage.layer - 1, alike):
            hook, first = cards[-1].hook.split(" ")[:2]
            cards[-1] = dataclasses.replace(alike, hook=f"{hook} {first} .. {stage.layer}")
        else:
            cards.append(card)
        last = stage.layer, alike
    return tuple(cards)


def _stage(stage: Stage) -> StageCard:
    hook = stage.hook.value
    if hook.endswith(("_layer", "_mlp", "_cache", "_block")):
        hook += f" {stage.layer}"
    signals = tuple(_signal(name, signal) for name, signal in stage.signals.items())
    return StageCard(hook, signals, stage.positions)


def _signal(name: str, signal: object) -> str:
    """``received: ReceivedAttention(layer=22)``: only what differs from the signal's defaults."""
    shown = [
        f"{f.name}={value_text(getattr(signal, f.name))}"
        for f in dataclasses.fields(signal)  # type: ignore[arg-type]
        if getattr(signal, f.name) != f.default
    ]
    return f"{name}: {type(signal).__name__}({', '.join(shown)})"


# ------------------------------------------------------------------------------------------------------------ print


def print_table(methods: Iterable[Card], console: Console | None = None) -> None:
    """One line per method: name, what it is, where it acts, for which model families."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("what")
    table.add_column("acts at")
    table.add_column("families")
    for method in methods:
        table.add_row(method.name, method.title, ", ".join(method.hooks), ", ".join(method.families))
    console = console or Console()
    console.print(table)
    console.print("`foveate show METHOD` tells more about one.", style="dim")


def markdown_table(methods: Iterable[Card]) -> str:
    """The table of :func:`print_table`, with papers, for a README; foveate's own methods link to docs/methods."""
    rows = [("method", "what", "paper", "acts at"), ("---",) * 4]
    rows += [(_linked(m.name), m.title, m.paper, ", ".join(f"`{hook}`" for hook in m.hooks)) for m in methods]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _linked(name: str) -> str:
    ours = PRUNERS[name].__module__.startswith("foveate.pruners.")
    return f"[`{name}`](docs/methods/{name}.md)" if ours else f"`{name}`"


def print_card(method: Card, console: Console | None = None) -> None:
    """A method in full."""
    console = console or Console()
    console.print(Text.assemble((method.name, "bold"), f"  {method.title}", ("\nfoveate." + method.class_name, "dim")))
    if method.paper:
        console.print(Text(method.paper))
    if method.doc:
        console.print()
        console.print(_prose(method.doc))

    console.print()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", style="bold", no_wrap=True)
    table.add_column("type")
    table.add_column("default")
    table.add_column("meaning")
    for p in method.parameters:
        default = "required" if p.default is None else p.default
        table.add_row(p.name, Text(p.type), Text(default), _prose(p.doc))
    console.print(table if method.parameters else "no parameters")

    console.print(Text("where it acts and what it reads, with default parameters", style="bold"))
    for label, stages in method.stages.items():
        console.print(Text(f"  {label}"))
        if isinstance(stages, str):
            console.print(Text(f"    {stages}"))
            continue
        if not stages:
            console.print(Text("    nowhere inside it: it prepares the picture", style="dim"))
        for stage in stages:
            extra = f"  [positions: {stage.positions}]" if stage.positions else ""
            console.print(Text.assemble("    ", (stage.hook, "cyan"), extra))
            for signal in stage.signals:
                console.print(Text(f"      reads {signal}"))

    console.print()
    counted = "as many as the picture asks for" if method.adaptive else "a number known in advance"
    if method.inside_decoder:
        counted += (
            "; the decoder's first layers see all of them, so the mean over its layers (of prefill work, and of the KV "
            "cache where earlier layers are not evicted) is not the final ratio"
        )
    for label, value in (
        ("families", ", ".join(method.families)),
        ("tokens kept", counted),
        ("cost", method.cost or "not stated"),
    ):
        console.print(Text.assemble((f"{label}: ", "bold"), value))
