"""``make check-releases``: what it prints and how it ends, with made-up answers of pip; foveate/tested.py is true."""

from __future__ import annotations

import configparser
import pathlib
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from foveate import tested
from foveate.tested import TESTED, minor, release
from tests import check_releases
from tests.check_releases import Unknown, main, newest_stable

ROOT = pathlib.Path(__file__).resolve().parent.parent
MADE_UP = {"alpha": tested.Tested("1.0", "1.2.0"), "beta-long-name": tested.Tested("2.0", "2.15.0", between=("2.9.1",))}


def listed(*versions: str) -> str:
    return f"package ({versions[0]})\nAvailable versions: {', '.join(versions)}\n  INSTALLED: 0.1\n"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | Unknown]:
    """What pip answers by name, at first the tested releases; put another answer in, or what is raised."""
    answers: dict[str, str | Unknown] = {"alpha": listed("1.2.0", "1.0"), "beta-long-name": listed("2.15.0", "2.9.1")}

    def answer(name: str) -> str:
        if isinstance(answers[name], Unknown):
            raise answers[name]
        return answers[name]

    monkeypatch.setattr(check_releases, "ask_pip", answer)
    return answers


# ------------------------------------------------------------------------------------------------------------ the check


def test_zero_where_the_tested_releases_are_the_newest(index, capsys):
    assert main(MADE_UP) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "package         tested  newest",
        "alpha           1.2.0   1.2.0",
        "beta-long-name  2.15.0  2.15.0",
        "",
        "The newest releases are those tested.",
    ]


@pytest.mark.parametrize("newest", ["2.15.1", "2.16", "2.100.0", "3.0.0+cpu"])
def test_one_where_something_newer_is_out(index, capsys, newest):
    index["beta-long-name"] = listed(newest, "2.15.0")
    assert main(MADE_UP) == 1
    out = capsys.readouterr().out
    assert f"beta-long-name  2.15.0  {newest}" in out
    assert "Newer than tested: beta-long-name. Run the tests with it" in out


@pytest.mark.parametrize("newest", ["2.15.0.post1", "2.15.0+cu132", "2.15"])
def test_another_build_of_the_tested_release_is_not_newer(index, newest):
    index["beta-long-name"] = listed(newest, "2.9.1")
    assert main(MADE_UP) == 0


def test_two_where_pip_has_no_answer_even_if_something_else_is_newer(index, capsys):
    index["alpha"] = Unknown("ERROR: No matching distribution found for alpha")
    index["beta-long-name"] = listed("2.16.0")
    assert main(MADE_UP) == 2
    out = capsys.readouterr().out
    assert "alpha           1.2.0   ?       unknown: ERROR: No matching distribution found for alpha\n" in out
    assert "Newer than tested: beta-long-name." in out
    assert "Not found out: alpha." in out


@pytest.mark.parametrize("printed", ["", "package (1.2.0)\n", "Available versions:\n", listed("1.3rc1"), listed("new")])
def test_two_where_the_answer_holds_no_stable_release(index, printed):
    index["alpha"] = printed
    assert main(MADE_UP) == 2


def test_two_where_pip_shows_less_than_was_tested(index, capsys):
    index["alpha"] = listed("1.1.9", "1.0")
    assert main(MADE_UP) == 2
    assert "unknown: older than tested" in capsys.readouterr().out


def test_two_where_there_is_nothing_to_check():
    assert main({}) == 2


def test_pre_releases_do_not_count():
    assert newest_stable(listed("3.0.0rc1", "3.0.0.dev20261101", "2.9.0", "2.10.0", "2.10.0a1")) == "2.10.0"


# ----------------------------------------------------------------------------------------------------------- asking pip


def pip_ends(monkeypatch: pytest.MonkeyPatch, code: int, out: str = "", err: str = "") -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, out, err))


def test_pip_s_own_reason_is_handed_on(monkeypatch):
    pip_ends(monkeypatch, 1, err="WARNING: experimental\nERROR: No matching distribution found for alpha\n")
    with pytest.raises(Unknown, match=r"^ERROR: No matching distribution found for alpha$"):
        check_releases.ask_pip("alpha")
    pip_ends(monkeypatch, 1, err="WARNING: experimental\n")
    with pytest.raises(Unknown, match="exit code 1"):
        check_releases.ask_pip("alpha")


def test_a_pip_that_hangs_is_a_reason(monkeypatch):
    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(Unknown, match="no answer within 120 s"):
        check_releases.ask_pip("alpha")


def test_what_pip_prints_is_read(monkeypatch):
    pip_ends(monkeypatch, 0, out=listed("1.2.0"))
    assert newest_stable(check_releases.ask_pip("alpha")) == "1.2.0"


# ------------------------------------------------------------------------------------------------------- foveate.tested


def test_releases_are_compared_by_their_numbers():
    assert release("2.15.0+cu132") == release("2.15") == (2, 15)
    assert release("5.9.0") < release("5.16.0rc1") < release("5.16.1")
    assert (minor("5.24.1"), minor("5")) == ((5, 24), (5, 0))
    with pytest.raises(ValueError, match="'main' is not a version"):
        release("main")


def test_minors_are_all_that_were_tested():
    assert tested.Tested("5.9.1", "5.24.0", between=("5.16.1", "5.16.0")).minors == ((5, 9), (5, 16), (5, 24))


@pytest.mark.parametrize("name", TESTED)
def test_oldest_is_not_newer_than_newest(name):
    of = TESTED[name]
    assert release(of.oldest) <= release(of.newest)
    assert all(release(of.oldest) < release(version) < release(of.newest) for version in of.between)


def test_setup_cfg_allows_what_was_tested():
    """Of every requirement that names a package of the table."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lists = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    table = {canonicalize_name(name): of for name, of in TESTED.items()}
    found = set()
    for line in "\n".join(lists).splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            found.add(name)
            for version in (table[name].oldest, table[name].newest) if name in table else ():
                assert version in requirement.specifier, f"setup.cfg has {line}; foveate/tested.py has {version}"
    assert table.keys() <= found, "packages that setup.cfg does not name"


def test_lmms_constraints_are_the_newest_tested():
    """`make test-lmms` runs with what the table says."""
    lines = (ROOT / "tests" / "lmms" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert "lmms-eval" in pins
    assert {name: TESTED[name].newest for name in pins if name in TESTED} == {n: pins[n] for n in pins if n in TESTED}
