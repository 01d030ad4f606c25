"""Public benchmarks by our names: the task of lmms-eval behind each, how a sample is scored, and what papers quote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from foveate.errors import FoveateError, UnknownNameError, nearest
from foveate.eval_suites.lmms.tasks import METRIC, PREFIX
from foveate.eval_suites.suites import SUITES

__all__ = ["BENCHMARKS", "Benchmark", "find"]


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval.

    Attributes:
        task: its name there.
        title: what it asks, in a line.
        metric: the entry of a logged sample that holds its score; several where a sample has one of them.
        score: reads the score in [0, 1] from that entry.
        headline: aggregated metrics whose sum papers quote, by default those of the samples.
        scale: what lmms-eval's number is multiplied by for that.
    """

    task: str
    title: str
    metric: tuple[str, ...] = ("exact_match",)
    score: Callable[[Any], float] = float
    headline: tuple[str, ...] = ()
    scale: float = 100.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "headline", self.headline or self.metric)

    def read(self, sample: Mapping[str, Any]) -> float:
        """The score of a logged sample.

        Raises:
            FoveateError: lmms-eval logged none.
        """
        for name in self.metric:
            if name in sample:
                return min(1.0, max(0.0, float(self.score(sample[name]))))
        raise FoveateError(
            f"lmms-eval logged no {' or '.join(self.metric)} for {self.task}; it holds {', '.join(sorted(sample))}"
        )

    def quoted(self, results: Mapping[str, Any]) -> float:
        """The number that papers quote, from lmms-eval's aggregated results.

        Raises:
            FoveateError: it is not there.
        """
        values = {name: results.get(f"{name},none") for name in self.headline}
        if missing := [name for name, value in values.items() if value is None]:
            raise FoveateError(
                f"lmms-eval's results of {self.task} hold no {' and no '.join(missing)}, which papers quote; they hold "
                f"{', '.join(sorted(results)) or 'nothing'}: run its version that foveate[eval] names, on all documents"
            )
        return self.scale * sum(values.values())


def _same(first: str, second: str) -> Callable[[Mapping[str, Any]], float]:
    """Right if two fields agree."""
    return lambda entry: float(entry[first] == entry[second])


def _overlap(entry: Mapping[str, Any]) -> float:
    """1 if the boxes' intersection is at least half of their union; boxes are left, top, right, bottom."""
    a, b = entry["bbox"], entry["pred"]
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return float(union > 0 and shared / union >= 0.5)


_SCORE, _CORRECT = itemgetter("score"), itemgetter("correct")
_MME = ("mme_perception_score", "mme_cognition_score")

# fmt: off
BENCHMARKS = {
    "pope": Benchmark("pope", "is this object in the picture?", ("pope_accuracy",), _SCORE, ("pope_f1_score",)),
    "mme": Benchmark("mme", "14 abilities, yes or no; perception and cognition together, up to 2800",
                     _MME, _SCORE, scale=1.0),
    "mme-perception": Benchmark("mme", "MME, of which the perception score is quoted, up to 2000",
                                _MME, _SCORE, _MME[:1], 1.0),
    "gqa": Benchmark("gqa", "composed questions about photographs"),
    "textvqa": Benchmark("textvqa_val", "questions about text in photographs, without OCR hints"),
    "vqav2": Benchmark("vqav2_val", "questions about photographs (validation split)"),
    "vizwiz": Benchmark("vizwiz_vqa_val", "questions of blind people (validation split)"),
    "scienceqa": Benchmark("scienceqa_img", "school questions with a picture"),
    "docvqa": Benchmark("docvqa_val", "questions about scanned documents", ("anls",)),
    "chartqa": Benchmark("chartqa", "questions about charts", ("relaxed_overall",)),
    "ocrbench": Benchmark("ocrbench", "reading, up to 1000", ("ocrbench_accuracy",), _SCORE, scale=1000.0),
    "seedbench": Benchmark("seedbench", "multiple choice, of which the share on pictures is quoted",
                           ("seed_all",), _same("pred", "answer"), ("seed_image",)),
    "seedbench-all": Benchmark("seedbench", "SEED-Bench, of which the share on pictures and videos is quoted",
                               ("seed_all",), _same("pred", "answer")),
    "refcoco": Benchmark("refcoco_bbox_rec_val", "where is what a phrase describes (boxes that overlap by half)",
                         ("refcoco_ACC@0.5",), _overlap),
    "screenspot": Benchmark("screenspot_rec_test", "boxes on screenshots (overlap by half)",
                            ("screenspot_ACC@0.5",), _overlap),
    "screenspot-v2": Benchmark("screenspot_v2", "clicks on screenshots", ("screenspot_v2_action_acc",), _CORRECT),
    "screenspot-pro": Benchmark("screenspot_pro", "clicks on large professional screens",
                                ("screenspot_pro_action_acc",), _CORRECT),
    "videomme": Benchmark("videomme", "multiple choice about videos of any length, without subtitles",
                          ("videomme_perception_score",), _SCORE, scale=1.0),
    "mlvu": Benchmark("mlvu_dev", "multiple choice about long videos",
                      ("mlvu_percetion_score",), _same("pred_answer", "answer"), scale=1.0),  # as lmms-eval spells it
    "longvideobench": Benchmark("longvideobench_val_v", "multiple choice about long videos (validation split)",
                                ("lvb_acc",), _same("parsed_pred", "answer")),
}
# fmt: on
"""Name -> benchmark, after ``lmms:`` in ``foveate bench --suite``."""


def find(name: str) -> Benchmark:
    """The benchmark called ``name``, or one of our own suites as a task (``foveate_shapes``).

    Raises:
        UnknownNameError: there is none; the message suggests the nearest.
    """
    ours = {PREFIX + suite.replace("-", "_"): suite for suite in SUITES}
    if name in ours:
        return Benchmark(name, f"the suite {ours[name]} within lmms-eval", (METRIC,))
    if name not in BENCHMARKS:
        raise UnknownNameError(f"unknown benchmark lmms:{name}; {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
