"""`foveate doctor` tells what is there, and fails where something should work and does not."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest

from foveate.cli import main
from foveate.errors import FoveateError, MissingSignalError
from foveate.eval_suites import doctor, tiny
from foveate.eval_suites.doctor import Finding, State
from foveate.eval_suites.running import models


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "FAMILIES", ("llava",))


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code and findings by name."""
    code = main(["doctor", "--json", *argv])
    return code, {f["what"]: f for f in json.loads(capsys.readouterr().out)}


def test_a_sound_machine_is_told_so(one_family, capsys):
    code, found = told(capsys)
    assert code == 0
    assert found["torch"]["told"] == importlib.metadata.version("torch")
    assert found["llava"] == {"part": "families", "what": "llava", "state": "ok", "told": "works"}
    assert found["shapes-llava"]["state"] == "ok"
    assert {f["part"] for f in found.values()} == {
        "versions",
        "GPU",
        "kernels",
        "embedded models",
        "families",
        "optional",
    }


def test_every_method_is_run_on_demand(one_family, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "PRUNERS", {name: doctor.PRUNERS[name] for name in ("divprune", "fastv", "hiprune")})
    code, found = told(capsys, "--full")
    assert found["llava"]["told"] == "3 methods run"
    assert code == 0


def test_methods_that_a_family_cannot_serve_are_no_failure(one_family, capsys, monkeypatch):
    real = doctor._run

    def run(model: Any, inputs: Any, name: str) -> None:
        if name == "random":
            raise MissingSignalError("no class token")
        real(model, inputs, name)

    monkeypatch.setattr(doctor, "_run", run)
    code, found = told(capsys)
    assert (code, found["llava"]["told"]) == (0, "works; not meant for it: random")


@pytest.mark.parametrize(
    ("error", "said"), [(RuntimeError("no kernel"), "RuntimeError: no kernel"), (FoveateError("no"), "(no)")]
)
def test_a_family_that_does_not_run_fails(error, said, one_family, capsys, monkeypatch):
    def run(*args: Any) -> None:
        raise error

    monkeypatch.setattr(doctor, "_run", run)
    code, found = told(capsys)
    assert (code, found["llava"]["state"]) == (1, "failed")
    assert said in found["llava"]["told"]


def test_kernels_that_were_asked_for_and_cannot_be_had_fail(one_family, capsys, monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FOVEATE_KERNELS", "cupy")
    code, found = told(capsys)
    assert (code, found["FOVEATE_KERNELS"]["state"]) == (1, "failed")
    monkeypatch.setenv("FOVEATE_KERNELS", "quick")
    code, found = told(capsys)
    assert code == 1
    assert "FOVEATE_KERNELS='quick' is unknown" in found["FOVEATE_KERNELS"]["told"]


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    assert doctor._cache(tmp_path / "not" / "yet" / "there").state is State.OK
    file = tmp_path / "file"
    file.touch()
    found = doctor._cache(file)
    assert found.state is not State.OK
    assert "set CUPY_CACHE_DIR" in found.told


def test_a_damaged_embedded_model_fails(one_family, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "source", lambda name: str(tmp_path))
    code, found = told(capsys)
    assert (code, found["shapes-llava"]["state"]) == (1, "failed")
    assert "config.json is missing" in found["shapes-llava"]["told"]


def test_absent_packages_say_what_they_would_enable(monkeypatch):
    monkeypatch.setattr(doctor, "version_of", lambda package: None)
    found = {f.what: f for f in doctor._optional(False)}
    assert all(f.state is State.NOTE for f in found.values())
    assert "`pip install 'foveate[demo]'` for `foveate demo`" in found["gradio"].told
    assert all(f.state is State.FAILED for f in doctor._versions() if f.what in doctor._CORE)


def test_an_optional_package_that_breaks_on_import_fails(monkeypatch):
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = {f.what: f for f in doctor._optional(True)}
    assert found["torchvision"].state is State.FAILED
    assert "nms" in found["torchvision"].told


def test_the_table_reads_well(monkeypatch, capsys):
    lines = [Finding("versions", "torch", State.OK, "2"), Finding("GPU", "cuda:0", State.FAILED, "RuntimeError: lost")]
    monkeypatch.setattr(doctor, "examine", lambda full: iter(lines))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "✗  cuda:0" in shown
    assert "1 of 2 checks failed." in shown
