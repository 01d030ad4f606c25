"""`foveate serve` builds vLLM's own command; vLLM itself is not needed for that."""

from __future__ import annotations

import json
import shlex

import pytest

from foveate.cli import main


def command(capsys, *arguments: str) -> list[str]:
    assert main(["serve", "some/model", "--dry-run", *arguments]) == 0
    return shlex.split(capsys.readouterr().out)


def overrides(words: list[str]) -> dict:
    return json.loads(words[words.index("--hf-overrides") + 1])


def test_the_method_travels_in_the_overrides_and_the_rest_as_it_is(capsys):
    words = command(capsys, "--pruner", "hiprune", "--keep", "1/4", "--set", "alpha=0.2", "--port", "80")
    assert overrides(words) == {"foveate": {"pruner": "hiprune", "keep": 0.25, "alpha": 0.2}}
    assert words[-2:] == ["--port", "80"]
    assert "some/model" in words


def test_other_overrides_stay(capsys):
    words = command(capsys, "--pruner", "random", "--hf-overrides", '{"rope_theta": 1}', "--port=80")
    assert overrides(words) == {"rope_theta": 1, "foveate": {"pruner": "random"}}
    assert words.count("--hf-overrides") == 1


def test_without_a_method_requests_may_ask_for_one(capsys):
    assert overrides(command(capsys)) == {"foveate": {}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--pruner", "nope"], "unknown method 'nope'"),
        (["--pruner", "random", "--keep", "0"], "keep=0"),
        (["--pruner", "random", "--keep", "half"], "--keep half"),
        (["--pruner", "random", "--set", "seed"], "NAME=VALUE"),
        (["--keep", "0.5"], "add --pruner"),
        (["--pruner", "random", "--hf-overrides", "{"], "not a JSON object"),
        (["--pruner", "random", "--hf-overrides", '{"foveate": {}}'], "already"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, says):
    assert main(["serve", "some/model", "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--pruner", "random"]], ids=str)
def test_the_front_end_in_rust_is_refused(capsys, monkeypatch, arguments):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert main(["serve", "some/model", *arguments]) == 2
    assert "VLLM_USE_RUST_FRONTEND=1" in capsys.readouterr().err


def test_the_front_end_in_python_is_not(capsys, monkeypatch):
    started = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("foveate.adapters.vllm_plugin.front._require_plugin", lambda: None)
    monkeypatch.setattr("os.execv", lambda *command: started.append(command))
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    assert main(["serve", "some/model"]) == 0
    assert len(started) == 1


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["list", "--port", "80"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --port 80" in capsys.readouterr().err
