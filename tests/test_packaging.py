"""The folders at the root make one import name, `foveate`, however it is installed, and importing it costs nothing."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import foveate
from foveate.tested import TESTED

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_SOURCE = {"build", "dist", "__pycache__", "node_modules"}
DATA = {".cu", ".cuh", ".html", ".jinja", ".json", ".md", ".safetensors", ".txt", ".typed"}
# What belongs to the project at top level and must never be imported by these names.
FOLDERS = {"adapters", "cuda", "demo", "eval_suites", "pruners"}
TRAINING = pathlib.Path("eval_suites/training")  # recipes, which run from a checkout


def files(root: pathlib.Path = ROOT) -> Iterator[pathlib.Path]:
    """The project's files, relative to `root`: no hidden folders, caches or build results."""
    for folder, folders, names in os.walk(root):
        folders[:] = [
            f for f in folders if not f.startswith(".") and f not in NO_SOURCE and not f.endswith(".egg-info")
        ]
        yield from ((pathlib.Path(folder) / name).relative_to(root) for name in names if not name.startswith("."))


def tracked() -> list[pathlib.Path]:
    """What is committed; in a copy without git, all files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return list(files())
    return [pathlib.Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python(code: str, cwd: pathlib.Path, *flags: str, path: pathlib.Path | None = None) -> str:
    """What `code` prints in a fresh interpreter that starts in `cwd`, with `path` as PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.fixture(scope="module")
def packages(setup_cfg: configparser.ConfigParser) -> dict[str, pathlib.Path]:
    """Import name -> folder, as setup.cfg maps them."""
    lines = setup_cfg["options"]["package_dir"].strip().splitlines()
    return {name.strip(): pathlib.Path(folder.strip()) for name, folder in (line.split("=") for line in lines)}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the source tree, so that building leaves no trace in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in files():
        if file.parts[0] != "tests":
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    return copy


def build(kind: str, checkout: pathlib.Path, out: pathlib.Path) -> zipfile.ZipFile:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    return zipfile.ZipFile(out / python(code, checkout).splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(checkout: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The unpacked wheel."""
    unpacked = tmp_path_factory.mktemp("wheel")
    build("wheel", checkout, tmp_path_factory.mktemp("dist")).extractall(unpacked)
    return unpacked


# ------------------------------------------------------------------------------------------------------ what is built


def test_every_package_is_listed(setup_cfg, packages):
    found = {file.parent for file in files() if file.name == "__init__.py" and file.parts[0] != "tests"}
    found.remove(TRAINING)
    assert set(packages.values()) == found
    assert setup_cfg["options"]["packages"].split() == list(packages)


def test_folders_are_mapped_below_foveate(packages):
    for name, folder in packages.items():
        assert name == (
            ".".join(folder.parts) if folder.parts[0] == "foveate" else ".".join(("foveate", *folder.parts))
        )


def test_wheel_provides_one_top_level_name(wheel):
    assert {path.name for path in wheel.iterdir()} == {"foveate", f"foveate-{foveate.__version__}.dist-info"}


def test_wheel_holds_all_source_and_data(wheel, checkout, packages):
    expected = set()
    for file in files(checkout):
        if TRAINING in file.parents:
            continue
        owner = next((name for name, folder in reversed(packages.items()) if folder in file.parents), None)
        if owner and file.suffix in DATA | {".py"}:
            expected.add(pathlib.Path(*owner.split(".")) / file.relative_to(packages[owner]))
    assert pathlib.Path("foveate/py.typed") in expected
    assert expected <= set(files(wheel))


def test_training_recipes_stay_in_the_checkout(wheel, checkout):
    """They read no result and no user needs them: a wheel holds none of their files."""
    assert list((checkout / TRAINING).glob("*.py"))
    assert not [file for file in files(wheel) if "training" in file.parts]


def test_wheel_installs_the_command(wheel):
    (info,) = wheel.glob("*.dist-info")
    assert "foveate = foveate.cli:main" in (info / "entry_points.txt").read_text()


# ------------------------------------------------------------------------------------- three ways to have it installed


def origins(packages: dict[str, str]) -> str:
    """Code that prints the file of every package.

    It runs with -S, so that no other installation of foveate may answer; nothing that needs torch can be imported then,
    only found, and `importlib.util.find_spec` would import the packages around.
    """
    return f"""
import itertools, sys
for name in {list(packages)}:
    path = None
    for outer in itertools.accumulate(name.split("."), lambda a, b: a + "." + b):
        loaded = sys.modules.get(outer)
        spec = next(filter(None, (finder.find_spec(outer, path) for finder in sys.meta_path)))
        path = spec.submodule_search_locations if loaded is None else loaded.__path__
    print(spec.origin)
"""


def test_wheel_imports_from_an_empty_folder(wheel, packages, tmp_path):
    code = f"import importlib\nfor name in {list(packages)}: print(importlib.import_module(name).__file__)"
    for name, file in zip(packages, python(code, tmp_path, path=wheel).splitlines()):
        assert pathlib.Path(file) == wheel.joinpath(*name.split("."), "__init__.py")


def test_editable_install_imports_from_an_empty_folder(checkout, packages, tmp_path):
    site = tmp_path / "site"
    build("editable", checkout, tmp_path).extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    code = f"import site; site.addsitedir({str(site)!r})" + origins(packages)
    for folder, file in zip(packages.values(), python(code, empty, "-S").splitlines()):
        assert pathlib.Path(file) == checkout / folder / "__init__.py"


def test_checkout_imports_without_being_installed(checkout, packages, tmp_path):
    # importing the top package gives it its path: the folders stand beside it
    code = "import foveate" + origins(packages)
    for folder, file in zip(packages.values(), python(code, tmp_path, "-S", path=checkout).splitlines()):
        assert pathlib.Path(file) == checkout / folder / "__init__.py"


@pytest.mark.parametrize("way", ["current folder", "PYTHONPATH"])
def test_nvidia_packages_import_beside_the_folder_named_cuda(way, tmp_path):
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed (extras cuda12, cuda13 and, on Linux, dev)")
    code = "import torch, cupy, cuda.pathfinder, foveate.cuda; print(cuda.pathfinder.__file__, foveate.cuda.__file__)"
    here = way == "current folder"
    theirs, ours = python(code, ROOT if here else tmp_path, path=None if here else ROOT).split()
    assert not pathlib.Path(theirs).is_relative_to(ROOT / "cuda")
    assert pathlib.Path(ours).is_relative_to(ROOT / "cuda")


# ------------------------------------------------------------------------------------------- what it says it works with


def lowest(lines: str, sign: str) -> dict[str, Version | None]:
    """Package -> the version after `sign` in its requirement, None where a requirement has none."""
    found = {}
    for line in lines.strip().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            version = next((Version(spec.version) for spec in requirement.specifier if spec.operator == sign), None)
            assert found.setdefault(name, version) == version, f"{name}: two lowest versions"
    return found


def test_lowest_versions_are_those_that_make_test_oldest_runs_on(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    tested = ("cuda12", "demo", "llava", "video", "vit")
    used = setup_cfg["options"]["install_requires"] + "".join(extras[extra] for extra in tested)
    assert None not in lowest(used, ">=").values()
    named = lowest(used + extras["dev"], ">=")  # without a lowest version: the tools of the tests
    del named["foveate"]
    assert named.pop("cupy-cuda13x") == named["cupy-cuda12x"]  # one release; torch's CUDA decides which of them can run
    pinned = lowest((ROOT / "tests" / "oldest-requirements.txt").read_text(), "==")
    assert named == pinned
    said = {canonicalize_name(name): Version(of.oldest) for name, of in TESTED.items()}
    assert said.pop("cupy-cuda13x") == pinned["cupy-cuda12x"]
    apart = {"lmms-eval", "vllm"}  # in environments of their own
    assert {name: version for name, version in said.items() if name not in apart} == {
        name: pinned[name] for name in said if name not in apart
    }


def test_building_and_testing_need_the_same_setuptools(setup_cfg):
    (needed,) = re.findall(r'^requires = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert needed in setup_cfg["options.extras_require"]["dev"].split()


def test_pre_commit_and_make_lint_run_the_same_ruff(setup_cfg):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (revision,) = [repo["rev"] for repo in config["repos"] if repo["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}" in setup_cfg["options.extras_require"]["lint"].split()


# ------------------------------------------------------------------------------------------------ what importing costs


def loaded_by(statement: str, tmp_path: pathlib.Path) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(python(code, tmp_path, path=ROOT).split())


def test_importing_foveate_loads_nothing_heavy(tmp_path):
    heavy = {"torch", "transformers", "numpy", "PIL", "rich", "tqdm", "safetensors", "cupy", "gradio"}
    assert not heavy & loaded_by("import foveate", tmp_path)


@pytest.mark.parametrize(
    "name", ["foveate.pruners", "foveate.cuda", "foveate.cli", "foveate.demo", "foveate.eval_suites"]
)
def test_importing_a_part_does_not_load_transformers(name, tmp_path):
    assert "transformers" not in loaded_by(f"import {name}", tmp_path)


def test_importing_foveate_takes_less_than_a_fifth_of_a_second(tmp_path):
    code = "import time; start = time.perf_counter(); import foveate; print(time.perf_counter() - start)"
    assert min(float(python(code, tmp_path, path=ROOT)) for _ in range(3)) < 0.2


# --------------------------------------------------------------------------------------------------- the public names


def test_public_names_are_listed_and_load():
    for name in dir(foveate):
        assert getattr(foveate, name) is not None


def test_every_method_is_public_by_its_class_name():
    for method in foveate.PRUNERS.values():
        assert getattr(foveate, method.__name__) is method


@pytest.mark.parametrize("name", ["nothing", "base", "_private"])  # base: a module that foveate.pruners imports
def test_unknown_names_are_attribute_errors(name):
    with pytest.raises(AttributeError, match=f"'foveate' has no attribute '{name}'"):
        getattr(foveate, name)


# ----------------------------------------------------------------------------------------------------- what files say


def test_code_imports_its_own_parts_as_foveate_only():
    """`import cuda.x` and `import foveate.cuda.x` would make two module objects; NVIDIA's own `cuda.*` is not ours."""
    wrong = []
    for file in tracked():
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            ours = [
                n for n in names if n.partition(".")[0] in FOLDERS and not re.match(r"cuda\.(pathfinder|bindings)\b", n)
            ]
            wrong += [f"{file}:{node.lineno} {name}" for name in ours]
    assert not wrong


def test_no_file_names_a_path_of_somebody_s_machine():
    path = re.compile(rb"(?<![\w.~-])/(work|root|home|Users|tmp/w)/\w")
    wrong = []
    for file in tracked():
        data = (ROOT / file).read_bytes()
        if b"\0" not in data:
            wrong += [f"{file}: {hit[0].decode()}" for hit in path.finditer(data)]
    assert not wrong
