"""Statement: imports between folders go one way, demo -> eval_suites -> adapters -> pruners -> cuda; foveate on top."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from foveate.pruners import PRUNERS

ROOT = Path(__file__).parents[1]
ORDER = ("cuda", "pruners", "adapters", "eval_suites", "demo")
# errors.py is everybody's; the command line and its page of methods stand above the folders, inside the facade
FREE = {"errors", "tested", "moved"}
FACADE = {"cli", "registry_view", "attach", "__version__"}
# what may reach up, late (inside a function), and why
EXCEPTIONS = {
    ("eval_suites/results/page.py", "registry_view"),  # the method cards of the web page are those of `foveate show`
    ("eval_suites/speed/__main__.py", "cli"),  # `python -m foveate.eval_suites.speed` is `foveate speed`
}


# names of transformers that adapters/compat.py alone may spell: they have changed, or may
UPSTREAM = (
    r"past_key_values|is_compileable|_deepstack_process|deepstack_visual_embeds|visual_pos_masks|create_causal_mask"
    r"|position_embeddings|apply_rotary_pos_emb\w*|apply_multimodal_rotary_pos_emb|q_norm|k_norm|\.scaling|\.num_heads"
    r"|cu_seqlens|mm_encoder_outputs|pooler_output|pack_image_features|unpad_image|get_anyres_image_grid_shape|apply_pooling"
    r"|get_(?:image|video)_features|get_(?:vision_)?window_index|interpolate_pos_encoding|(?:CLIP|Siglip)EncoderLayer|ViTLayer|Dinov2\w*Layer"
    r"|gradient_checkpointing|_attn_implementation|_name_or_path|cached_file|\.get_seq_length"
)
# files that spell some of them for another reason
OTHERS = {
    "adapters/compat.py": "its business",
    "adapters/engine/legacy_decoder.py": "transformers 4.36 and 4.37, which change no more",
    "adapters/families/llava_original.py": "names of the package llava",
    "adapters/towers/open_clip.py": "names of open_clip",
    "adapters/towers/timm.py": "names of timm",
    "adapters/towers/base.py": "names of torch",
    "adapters/vllm_plugin/towers.py": "names of vLLM",
    "pruners/core/clip_text.py": "a user's CLIP; pruners stand below the adapters",
    "eval_suites/vision/subjects.py": "public methods of CLIP and SigLIP models",
    **{
        f"eval_suites/training/{model}.py": "a training recipe, which runs by itself"
        for model in ("shapes_clip", "shapes_llava", "shapes_qwen")
    },
}


def imported(file: Path, late: bool = True) -> Iterator[str]:
    """Names below `foveate` that a file imports: first component; without `late`, at module level alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "foveate":
                yield rest.partition(".")[0]


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ORDER)
def test_imports_go_one_way(folder):
    below = {*ORDER[: ORDER.index(folder) + 1], *FREE}
    for file in files(folder):
        name = file.relative_to(ROOT).as_posix()
        upward = {head for head in imported(file) if head in {*ORDER, *FACADE} - below}
        assert all((name, head) in EXCEPTIONS for head in upward), f"{name} imports {sorted(upward)}"


def test_exceptions_are_still_needed_and_late():
    for name, head in EXCEPTIONS:
        assert head in imported(ROOT / name), f"{name} no longer imports {head}"
        assert head not in imported(ROOT / name, late=False)


def test_no_adapter_names_a_method():
    """Neither by import nor by name; "random" and "grid" are words of other things as well."""
    modules = {method.__module__.rpartition(".")[2] for method in PRUNERS.values()}
    classes = {method.__name__ for method in PRUNERS.values()}
    for file in files("adapters"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foveate.pruners"):
                assert node.module.rpartition(".")[2] not in modules, f"{where} imports {node.module}"
                assert not classes & {alias.name for alias in node.names}, where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in PRUNERS.keys() - {"grid", "random"}, f"{where} names {node.value}"


def spelled(file: Path) -> set[str]:
    """Upstream names in a file's code; prose does not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        words = {
            ast.Attribute: lambda n: [f".{n.attr}", n.attr],
            ast.Name: lambda n: [n.id],
            ast.arg: lambda n: [n.arg],
            ast.keyword: lambda n: [n.arg or ""],
            ast.alias: lambda n: [n.name],
            ast.Constant: lambda n: [n.value] if isinstance(n.value, str) and id(n) not in prose else [],
        }.get(type(node), lambda n: [])(node)
        found |= {word for word in words if re.fullmatch(UPSTREAM, word)}
    return found


def test_names_of_transformers_stand_in_one_file():
    for folder in (*ORDER, "foveate"):
        for file in files(folder):
            name = file.relative_to(ROOT).as_posix()
            if name not in OTHERS:
                assert not spelled(file), f"{name} spells {sorted(spelled(file))}: let adapters/compat.py do it"
    for name in OTHERS:
        assert spelled(ROOT / name), f"{name} spells none of them any more"


def test_every_module_says_what_lives_there():
    for folder in (*ORDER, "foveate", "tests"):
        for file in files(folder):
            text = file.read_text(encoding="utf-8")
            assert not text.strip() or ast.get_docstring(ast.parse(text)), (
                f"{file.relative_to(ROOT)} has no first lines"
            )
