"""Our suites as tasks of lmms-eval, written to a folder for ``--include_path``.

A document is a sample's number: suites draw the same samples on every machine, so pictures and videos are made anew
where they are needed, and scored by the suite's own rule. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.errors import FoveateError, ParameterError
from foveate.eval_suites import suites
from foveate.eval_suites.suites import Sample, Suite

__all__ = ["METRIC", "PREFIX", "add_arguments", "export", "main"]

PREFIX = "foveate_"
"""Before a suite's name in lmms-eval, which has ``_`` where the suite has ``-``."""
METRIC = "right"

_UTILS = '''"""Functions of the tasks beside this file; foveate has to be installed."""

from foveate.eval_suites.lmms.tasks import doc_to_messages, doc_to_text, doc_to_visual, process_results  # noqa: F401
'''

_TASK = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_messages: !function utils.doc_to_messages
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def export(
    folder: str | os.PathLike[str], names: Sequence[str] = (), limit: int = 200, seed: int | None = None
) -> list[str]:
    """Write tasks into ``folder``, which is made if need be, and return their names.

    Args:
        names: of suites; none: all. limit: samples of each; seed: which ones (None: the suite's own choice).

    Raises:
        UnknownNameError: no such suite. ParameterError: no samples.
    """
    if limit < 1:
        raise ParameterError(f"limit={limit}: give at least 1")
    chosen = [suites.find(name) for name in names or suites.SUITES]
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utils.py").write_text(_UTILS, encoding="utf-8")
    written = []
    for suite in chosen:
        task = PREFIX + suite.name.replace("-", "_")
        drawn = suite.seed if seed is None else seed
        data = folder / f"{task}.jsonl"
        head = {"suite": suite.name, "seed": drawn, "limit": limit}
        documents = [
            {**head, "number": number, **{name: getattr(sample, name) for name in ("id", "task", "question", "answer")}}
            for number, sample in enumerate(suite.samples(limit, drawn))
        ]
        data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        text = _TASK.format(
            task=task,
            data=json.dumps(str(data)),  # lmms-eval would look for a relative path in the working directory
            max_new_tokens=suite.max_new_tokens,
            metric=METRIC,
        )
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
        written.append(task)
    return written


# ---------------------------------------------------------------------------------------------- called by lmms-eval


@functools.lru_cache(maxsize=4)
def _drawn(name: str, limit: int, seed: int) -> tuple[Suite, list[Sample]]:
    suite = suites.find(name)
    return suite, list(suite.samples(limit, seed))


def _sample(doc: dict[str, Any]) -> tuple[Suite, Sample]:
    suite, samples = _drawn(doc["suite"], doc["limit"], doc["seed"])
    sample = samples[doc["number"]]
    if (sample.id, sample.question, sample.answer) != (doc["id"], doc["question"], doc["answer"]):
        raise FoveateError(
            f"task data of {doc['suite']} is of another version of foveate (sample {doc['id']}); run `foveate suites "
            "export` again"
        )
    return suite, sample


def _visual(sample: Sample) -> Any:
    """A picture, or the frames of a video as pictures."""
    if hasattr(sample, "video"):
        return [Image.fromarray(frame) for frame in sample.video]
    return sample.image.convert("RGB")


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """What the document shows."""
    return [_visual(_sample(doc)[1])]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question."""
    return doc["question"]


def doc_to_messages(
    doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """A user's turn: the picture or video, and the question."""
    sample = _sample(doc)[1]
    kind = "video" if hasattr(sample, "video") else "image"
    content = [{"type": kind, "url": _visual(sample)}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a right answer by the suite's rule, else 0."""
    suite, sample = _sample(doc)
    return {METRIC: float(suite.score(sample, results[0].strip()))}


# ------------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``foveate suites``."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    lists = actions.add_parser("list", help="the suites, and the public benchmarks that run through lmms-eval")
    lists.set_defaults(action=_list)
    writes = actions.add_parser("export", help="write suites as tasks for `python -m lmms_eval --include_path`")
    writes.add_argument("folder", metavar="DIR", help="where to; made if it is not there")
    writes.add_argument("--suite", metavar="NAMES", default="", help="these only, separated by commas")
    writes.add_argument("--limit", metavar="N", type=int, default=200, help="samples of each (default: 200)")
    writes.add_argument("--seed", metavar="N", type=int, help="which samples (default: the suite's own choice)")
    writes.set_defaults(action=_export)


def main(args: argparse.Namespace) -> int:
    """Run ``foveate suites``."""
    return args.action(args)


def _list(args: argparse.Namespace) -> int:
    from foveate.eval_suites.lmms.benchmarks import BENCHMARKS

    for name in suites.SUITES:
        print(f"{name:<22} {suites.find(name).title}")
    for name, benchmark in BENCHMARKS.items():
        print(f"lmms:{name:<17} {benchmark.title}")
    return 0


def _export(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.suite.split(",") if name.strip()]
    tasks = export(args.folder, names, args.limit, args.seed)
    print(
        f"wrote {', '.join(tasks)}; use them with: --include_path {Path(args.folder).resolve()} --tasks "
        f"{','.join(tasks)}"
    )
    return 0
