"""``foveate bench --suite lmms:pope,gqa,…``: public benchmarks through lmms-eval, answers in our result store.

lmms-eval runs in this process, on one model that stays loaded while methods change: what goes wrong is an exception
here, and not a line in the log of a program that ends with exit code 0. Its answer cache is not used; the store knows
what is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import foveate
from foveate.errors import BudgetError, FoveateError, ParameterError, StoreError, UnsupportedModelError, nearest
from foveate.eval_suites.lmms import benchmarks, tasks
from foveate.eval_suites.lmms.benchmarks import Benchmark
from foveate.eval_suites.lmms.manifests import CLASSES, MODELS
from foveate.eval_suites.lmms.watch import Said, Seen
from foveate.eval_suites.results.leaderboard import Leaderboard
from foveate.eval_suites.results.rows import Answer, Status
from foveate.eval_suites.results.store import Store
from foveate.eval_suites.running import models, runner
from foveate.eval_suites.running.cost import DecoderShape
from foveate.eval_suites.running.distributed import world
from foveate.eval_suites.running.environment import environment
from foveate.eval_suites.running.meter import BudgetMismatch, MethodRun
from foveate.eval_suites.terminal import one_line
from foveate.pruners.core import Keep

__all__ = ["PREFIX", "Kept", "Outcome", "answers", "bench", "check_installed", "run"]

logger = logging.getLogger(__name__)

PREFIX = "lmms:"
"""Before benchmarks in ``--suite``."""


def check_installed() -> None:
    """Raise :class:`FoveateError` unless lmms-eval and what its models import are there."""
    missing = [name for name in ("lmms_eval", "decord") if importlib.util.find_spec(name) is None]
    if missing:
        raise FoveateError(
            f"suites after {PREFIX} run through lmms-eval, and {' and '.join(missing)} "
            f"{'are' if missing[1:] else 'is'} not installed here: run `pip install 'foveate[eval]'`"
        )


@dataclass(frozen=True)
class Outcome:
    """What one run of a benchmark gave.

    Attributes:
        answers: one per document.
        positions: what was done with positions, by hook point.
        quoted: the number that papers quote; None where documents failed, or the first ones hold nothing of it.
    """

    answers: list[Answer]
    positions: dict[str, str]
    quoted: float | None


def bench(
    model: str,
    names: str,
    pruners: str = "all",
    keep: Sequence[Keep] = (0.25,),
    limit: int | None = 200,
    *,
    seeds: int = 5,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    positions: str = "auto",
    out: str | os.PathLike[str] | None = None,
    fresh: str = "",
    retry: bool = False,
    runs: Sequence[MethodRun] | None = None,
) -> list[Leaderboard]:
    """Run methods over public benchmarks, beside the unpruned model, a blind one and the baselines.

    Args:
        model: a folder or a name on the hub; names: benchmarks separated by commas, with or without ``lmms:``.
        limit: documents of each; None: all.
        runs: these instead of ``pruners`` at the budgets ``keep``.
        other arguments: see :func:`foveate.eval_suites.running.runner.bench`.

    Returns:
        A leaderboard per benchmark, in the order of ``names``. The number that papers quote is in the rows in which no
        document failed.

    Raises:
        FoveateError: bad input, a data set that is not there, or a model that cannot answer without a method either.
    """
    if (started := world().size) > 1:
        raise ParameterError(
            f"suites after {PREFIX} run in one process, but this is one of {started} that torchrun or accelerate "
            "started: give every GPU a command of its own, with benchmarks of its own and the same --out "
            "(`CUDA_VISIBLE_DEVICES=0 foveate bench --suite lmms:pope ...`); several may write to one file"
        )
    chosen = {name: benchmarks.find(name) for name in _names(names)}
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ParameterError(f"batch_size={batch_size}, limit={limit}: give at least 1")
    runs = runner.plan(pruners, list(keep), seeds) if runs is None else runs
    check_installed()
    family = model_id(model)
    with _quiet(), tasks_at_hand(list(chosen.values()), family, limit) as manager:
        documents = {name: _documents(found, manager, limit) for name, found in chosen.items()}
        lm = load(model, family, batch_size, device, dtype)
        weights = models.digest(model)
        boards = []
        with Store(":memory:" if out is None else out) as store:
            for name, benchmark in chosen.items():
                shape = DecoderShape.of(lm.watch.adapter.text_model.config, lm.model.dtype.itemsize)
                asked = documents[name]
                facts = environment(lm.model) | {
                    "model": model,
                    "weights_sha256": weights,
                    "suite": PREFIX + name,
                    "suite_seed": None,
                    "limit": len(asked),
                    "samples_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
                    "chance": None,
                    "batch_size": batch_size,
                    "positions": positions,
                    "decoder": shape.as_json() if shape else None,
                    "lmms_eval": importlib.metadata.version("lmms_eval"),
                }
                number = store.open_bench(facts, (name,), fresh)
                if retry:
                    store.retry(number)
                _measure(store, number, lm, name, benchmark, manager, runs, positions, limit, len(asked))
                boards.append(store.board(number))
    return boards


def _names(text: str) -> list[str]:
    names = [part.strip().removeprefix(PREFIX) for part in text.split(",") if part.strip()]
    if not names:
        raise ParameterError(f"--suite {text!r} names no benchmark; {nearest('', benchmarks.BENCHMARKS)}")
    return list(dict.fromkeys(names))


def model_id(model: str) -> str:
    """The name in lmms-eval of what can run this checkpoint.

    Raises:
        UnsupportedModelError: none can. FoveateError: no such model, or no network to ask for it.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(models.source(model)).model_type
    except FoveateError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, … alike
        raise FoveateError(f"model {model!r} cannot be had: {_line(error)}; check its name and the network") from error
    if kind not in MODELS:
        raise UnsupportedModelError(f"{model} is a {kind}; within lmms-eval foveate runs {', '.join(sorted(MODELS))}")
    return MODELS[kind]


def load(model: str, family: str, batch_size: int, device: str | None, dtype: str | None) -> Any:
    """The model of lmms-eval, which stays loaded."""
    import torch
    from lmms_eval.models import get_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {}
    if "Qwen" not in CLASSES[family]["chat"]:
        options["dtype"] = dtype or ("float32" if device == "cpu" else "auto")
    elif dtype not in (None, "bfloat16"):
        raise ParameterError(f"dtype={dtype!r}: lmms-eval loads this family in bfloat16 and nothing else")
    try:
        options |= {"pretrained": models.source(model), "device": device, "batch_size": batch_size}
        lm = get_model(family)(**options, foveate_version=foveate.__version__)
    except FoveateError:
        raise
    except Exception as error:
        raise FoveateError(f"lmms-eval cannot load {model!r} as {family}: {_line(error)}") from error
    lm.kept_for_later = True
    return lm


@contextlib.contextmanager
def tasks_at_hand(chosen: Sequence[Benchmark], family: str, limit: int | None) -> Iterator[Any]:
    """lmms-eval's tasks, with ours among them if they are asked for."""
    import tempfile

    from lmms_eval.tasks import TaskManager

    own = [benchmark.task for benchmark in chosen if benchmark.task.startswith(tasks.PREFIX)]
    with tempfile.TemporaryDirectory() as folder:
        if own:
            from foveate.eval_suites.suites import SUITES

            suites = [name for name in SUITES if tasks.PREFIX + name.replace("-", "_") in own]
            tasks.export(folder, suites, limit or 2000)
        yield TaskManager(
            "ERROR",
            include_path=folder if own else None,
            include_defaults=len(own) < len(chosen),
            model_name=family.removeprefix("foveate_"),  # prompts of a task may depend on it
        )


def _documents(benchmark: Benchmark, manager: Any, limit: int | None) -> list[str]:
    """Question and answer of every document.

    Raises:
        FoveateError: the data set is not there.
    """
    from lmms_eval.tasks import get_task_dict

    try:
        task = get_task_dict([benchmark.task], manager, "chat")[benchmark.task]
        docs = task.eval_docs_no_media
        return [f"{task.doc_to_text(doc)}\0{task.doc_to_target(doc)}" for doc in itertools.islice(docs, limit)]
    except Exception as error:  # datasets and huggingface_hub raise what they like
        raise FoveateError(
            f"the data of {PREFIX}{benchmark.task} cannot be had: {_line(error)}; it needs the network once, or a "
            "filled cache of Hugging Face data sets (HF_HOME)"
        ) from error


def _line(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) <= 300 else text[:297] + "..."


def _measure(
    store: Store,
    bench: int,
    lm: Any,
    name: str,
    benchmark: Benchmark,
    manager: Any,
    runs: Sequence[MethodRun],
    positions: str,
    limit: int | None,
    documents: int,
) -> None:
    """Do what the store does not hold yet."""
    rows = [run.row() for run in runs]
    for run_, row in zip(runs, rows):
        with contextlib.suppress(FoveateError):
            stages = () if run_.pruner is None else run_.pruner.stages(lm.watch.adapter.info)
            row.guided = any(stage.text_guided for stage in stages)
    for run_, number in zip(runs, store.open_runs(bench, rows)):
        if store.status(number) is Status.OK and not _complete(store, number, documents):
            lm.journal = Kept(store, number, benchmark.task, _called(run_))
            try:
                outcome = run(lm, run_, benchmark, manager, positions, limit)
                if outcome.quoted is not None:
                    headline = f"{PREFIX}{name} {_called(run_)}: {' + '.join(benchmark.headline)} {outcome.quoted:.4g}"
                    print(f"foveate: {headline}", file=sys.stderr)
                    store.quote(number, outcome.quoted)
                store.add(number, outcome.answers, outcome.positions)
            except StoreError:
                raise
            except (UnsupportedModelError, BudgetError, ParameterError) as error:
                store.give_up(number, Status.NOT_APPLICABLE, str(error), 0)
            except Exception as error:  # the other methods go on
                logger.info("%s failed", run_.label, exc_info=True)
                what = str(error) if isinstance(error, BudgetMismatch) else f"{type(error).__name__}: {_line(error)}"
                store.give_up(number, Status.FAILED, what, 0)
            finally:
                lm.journal = None
        if run_.method == "unpruned":
            failed = [answer.error for answer in store.answers(number).values()]
            if reason := store.reason(number) or (failed[0] if failed and all(failed) else None):
                raise FoveateError(f"{PREFIX}{name} does not run even without a method ({reason})")


def _complete(store: Store, number: int, documents: int) -> bool:
    """Whether every document of a run is scored, and the number that papers quote is there; or one has failed."""
    answers = store.answers(number).values()
    failed = [answer.error is not None for answer in answers]
    scored = len(answers) == documents and all(a.score is not None or a.error is not None for a in answers)
    return scored and (any(failed) or store.quoted(number) is not None)


@dataclass(frozen=True)
class Kept:
    """Answers of a run in the result file as soon as they are given; lmms-eval scores them when it has all of them.

    Attributes:
        run: its number in the store.
        task: of lmms-eval.
        label: what the progress bar says.
    """

    store: Store
    run: int
    task: str
    label: str

    def known(self) -> dict[int, Said]:
        """What was said before an interruption, by the document's place."""
        said = {}
        for number, a in self.store.answers(self.run).items():
            seen = Seen(a.tokens, a.cached, a.asked, a.text_tokens)
            said[number] = Said("", None, None, a.error) if a.error is not None else Said(a.text, seen, a.seconds)
        return said

    def add(self, first: int, documents: Sequence[Any], said: Sequence[Said], positions: Mapping[str, str]) -> None:
        """Keep a batch, whose documents begin at place ``first``, without scores."""
        batch = []
        for number, (document, one) in enumerate(zip(documents, said), first):
            told = {"error": one.error} if one.error else {"text": one.text, "seconds": one.seconds, **vars(one.seen)}
            batch.append(Answer(number, _sample(self.task, document), self.task, **told))
        self.store.add(self.run, batch, positions)


def _sample(task: str, document: Any) -> str:
    return f"{task}-{document}"


def _called(run: MethodRun) -> str:
    parts = [run.label]
    parts += [] if run.keep is None else [f"keep {run.keep:.4g}"]
    parts += [] if run.seed is None else [f"seed {run.seed}"]
    return ", ".join(parts)


def run(lm: Any, run: MethodRun, benchmark: Benchmark, manager: Any, positions: str, limit: int | None) -> Outcome:
    """One method over one benchmark.

    Raises:
        BudgetMismatch: it kept another number of tokens than it should. FoveateError: lmms-eval does not give the
            number that papers quote, although all documents were asked.
    """
    from lmms_eval.evaluator import simple_evaluate

    lm.use(run.pruner, positions, blank=run.method == "no-image")
    results = simple_evaluate(
        model=lm,
        tasks=[benchmark.task],
        batch_size=lm.batch_size,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=manager,
        process_docs_parallel=1,
        verbosity="ERROR",
    )
    read = answers(results["samples"][benchmark.task], benchmark, lm.watch.adapter.info.decoder_layers)
    return Outcome(read, lm.watch.positions, _quoted(read, benchmark, results["results"][benchmark.task], limit))


def _quoted(
    read: Sequence[Answer], benchmark: Benchmark, results: Mapping[str, Any], limit: int | None
) -> float | None:
    """The number that papers quote. lmms-eval's takes what failed for the answer "", so that it is none then."""
    if any(answer.error is not None for answer in read):
        return None
    try:
        return benchmark.quoted(results)
    except FoveateError:
        if limit is None:
            raise
        return None  # the first documents of MME, say, are about cognition only


def answers(samples: Sequence[Mapping[str, Any]], benchmark: Benchmark, layers: int) -> list[Answer]:
    """Samples as lmms-eval logs them, from its results or its ``_samples_….jsonl``.

    Raises:
        FoveateError: they were not counted by foveate's models (answers out of lmms-eval's cache never are), or not
            scored.
    """
    read = []
    for number, sample in enumerate(sorted(samples, key=lambda sample: sample["doc_id"])):
        counts = (sample.get("token_counts") or [None])[0] or {}
        tokens, held = counts.get("tokens"), counts.get("cached")
        document = _sample(benchmark.task, sample["doc_id"])
        if counts.get("error"):
            read.append(Answer(number, document, benchmark.task, error=counts["error"]))
            continue
        if tokens is None or len(tokens) != layers:
            raise FoveateError(
                f"document {sample['doc_id']} of {benchmark.task} comes without its number of visual tokens: run it "
                "with one of foveate's models and without --use_cache"
            )
        text = sample["filtered_resps"]
        while isinstance(text, list):
            text = text[0] if text else ""
        read.append(
            Answer(
                number=number,
                sample=document,
                task=benchmark.task,
                text=str(text).strip(),
                score=benchmark.read(sample),
                tokens=tuple(tokens),
                cached=None if held is None else tuple(held),  # older logs have none
                asked=counts["asked"],
                text_tokens=counts["text_tokens"],
                seconds=counts["seconds"],
            )
        )
    return read


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval talks a lot on stderr; what matters is raised."""
    from loguru import logger as theirs

    theirs.remove()
    theirs.add(sys.stderr, level="ERROR", format="lmms-eval: {message}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="keep=.* exceeds")
        yield
