"""vLLM's OpenAI-compatible server with foveate in it, asked by OpenAI's own client over HTTP."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from foveate.eval_suites.suites import shapes
from tests.vllm.engines import ROOT, folder, served

openai = pytest.importorskip("openai")

MODEL, KEEP = "llava", 0.25
PLACES = 144  # tokens of a picture of shapes-llava
ASKED = list(shapes.samples(32, shapes.HELD_OUT_SEED))


@contextlib.contextmanager
def running(home: str, *arguments: str, patience: int = 300) -> Iterator[openai.OpenAI]:
    """`foveate serve` in a process group of its own, up and answering."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "foveate",
        "serve",
        home,
        *arguments,
        "--port",
        str(port),
        "--served-model-name",
        "it",
    ]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--block-size", "32"]
    command += ["--limit-mm-per-prompt", '{"image": 2}', "--max-num-seqs", "32"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + patience
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert server.poll() is None, f"the server ended with exit code {server.returncode}"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def ask(client: openai.OpenAI, seed: int, foveate: object = None, **options: object):
    buffer = io.BytesIO()
    shown = ASKED[seed]
    shown.image.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": shown.question}]
    extra = {} if foveate is None else {"mm_processor_kwargs": {"foveate": foveate}}
    return client.chat.completions.create(
        model="it",
        messages=[{"role": "user", "content": content}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        # vLLM leaves a chat's first token to its template; shapes-llava's has none and was trained with the tokenizer's
        extra_body={"ignore_eos": True, "add_special_tokens": True, **extra},
        **options,
    )


def same(answer, alone) -> None:
    """The server's answer is as long and as likely, token by token, as the engine's own."""
    assert answer.usage.prompt_tokens == len(alone.prompt_token_ids)
    assert answer.choices[0].message.content.strip() == alone.outputs[0].text.strip()
    steps = zip(answer.choices[0].logprobs.content, alone.outputs[0].logprobs, alone.outputs[0].token_ids)
    for token, likely, chosen in steps:
        assert token.logprob == pytest.approx(likely[chosen].logprob, abs=1e-3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return folder(MODEL, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def client(home):
    with running(str(home), "--pruner", "hiprune", "--keep", str(KEEP), "--trust-request-mm-kwargs") as it:
        yield it


@pytest.fixture(scope="module")
def expected(home):
    """What the same engine says without a server, one request after the other."""
    with served(MODEL, home.parent, {"pruner": "hiprune", "keep": KEEP}) as engine:
        return [engine.answer([engine.request([s.image], text=s.question)], tokens=4)[0] for s in ASKED]


def test_the_prompt_is_shorter_by_what_is_pruned(client):
    pruned, whole = (ask(client, 0, entry).usage.prompt_tokens for entry in (None, False))
    assert whole - pruned == PLACES - round(KEEP * PLACES)


def test_thirty_two_requests_at_once_are_answered_as_one_by_one(expected, client):
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda seed: ask(client, seed), range(32)))
    for answer, alone in zip(answers, expected):
        same(answer, alone)
    right = [s.answer in a.choices[0].message.content for s, a in zip(ASKED, answers)]
    assert sum(right) > 16, "what is left of the pictures still answers questions"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"pruner": "hipruen"}, "did you mean 'hiprune'"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 7.5}, "keep=7.5"),
        ({"pruner": "cdpruner"}, "reads the question"),
        ({"kep": 3}, "did you mean 'keep'"),
        ("half", "no settings"),
    ],
)
def test_bad_requests_are_answered_with_our_message_and_the_server_lives_on(client, entry, says):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, 1, entry)
    assert refused.value.status_code == 400
    assert says in str(refused.value)
    assert ask(client, 1).choices[0].message.content is not None


@pytest.mark.timeout(600)  # it starts slowly, and has the patience for that
def test_two_data_parallel_processes_say_the_same(home, expected, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running(
        str(home), "--pruner", "hiprune", "--keep", str(KEEP), "--data-parallel-size", "2", patience=400
    ) as client:
        for seed in range(4):
            same(ask(client, seed), expected[seed])
