"""The wheel holds the package and nothing else, every module of it imports, and imports follow the floors."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_INSTALLED = {"tests", "docs", "scripts", "build", "dist", "runs", "wandb", "shared"}
# Low to high. A file imports from its own floor or below.
FLOORS = {"kernels": 0, "vlm": 1, "data": 2, "train": 3, "eval": 3, "cli": 4}

IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import foveate

names, failed = ["foveate"], {}
names += [module.name for module in pkgutil.walk_packages(foveate.__path__, "foveate.", lambda name: None)]
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = [getattr(error, "name", None) or "", f"{type(error).__name__}: {error}"]
print(json.dumps({"file": foveate.__file__, "version": foveate.__version__, "names": names, "failed": failed}))
"""


def source_files() -> Iterator[Path]:
    """The files that belong in the wheel if they are Python, relative to the root."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__pycache__")) and not name.endswith(".egg-info")
            if Path(folder) != ROOT or name not in NOT_INSTALLED
        ]
        yield from ((Path(folder) / name).relative_to(ROOT) for name in files)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout and no earlier build leaks in."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "wandb", "shared")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source")]
    built = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_only_foveate_and_its_metadata(wheel_files: set[str]) -> None:
    folders = {name.split("/")[0] for name in wheel_files}
    assert {re.sub(r"-[\d.]+\.dist-info$", ".dist-info", folder) for folder in folders} == {
        "foveate",
        "foveate.dist-info",
    }
    assert {name.split("/")[1] for name in wheel_files if name.startswith("foveate/")}.isdisjoint(NOT_INSTALLED)
    assert "foveate/pyproject.toml" not in wheel_files


def test_wheel_holds_every_module_and_data_file(wheel_files: set[str]) -> None:
    sources = [path.as_posix() for path in source_files()]
    data = r"py\.typed|train/recipes/.+\.yaml|train/deepspeed/.+\.json|eval/tasks/(.+\.yaml|_template)"
    expected = {f"foveate/{name}" for name in sources if name.endswith(".py") or re.fullmatch(data, name)}
    assert sorted(expected - wheel_files) == []


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in source_files() if path.suffix == ".py"}
    assert sorted(str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()) == []


@pytest.mark.timeout(600)
def test_every_module_imports_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    # -S leaves out site-packages and with it the editable install's hook; the libraries come back as plain folders.
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    command = [sys.executable, "-I", "-S", "-c", IMPORT_ALL, str(installed), *libraries]
    ran = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])

    assert Path(report["file"]) == installed / "foveate" / "__init__.py"
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    assert wheel.name.startswith(f"foveate-{report['version']}-")

    # Only an extra may be missing.
    extras = [name for extra, names in project["optional-dependencies"].items() if extra != "dev" for name in names]
    optional = {re.split(r"[<>=!~; \[]", name)[0].replace("-", "_") for name in extras} | {"lmms_eval"}
    failed = [
        f"{name}: {why}" for name, (missing, why) in report["failed"].items() if missing.split(".")[0] not in optional
    ]
    assert not failed, "\n".join(failed)
    modules = {".".join(("foveate", *path.with_suffix("").parts)) for path in source_files() if path.suffix == ".py"}
    assert {name.removesuffix(".__init__") for name in modules} == set(report["names"])


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names that a module imports; those of this package, however written, begin with `foveate`."""
    package = ["foveate", *path.parent.parts]
    for node in ast.walk(ast.parse((ROOT / path).read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join([*module, alias.name]) for alias in node.names)


def modules_by_floor() -> dict[Path, int]:
    paths = [path for path in source_files() if path.suffix == ".py" and path != Path("__init__.py")]
    return {path: FLOORS[path.parts[0].removesuffix(".py")] for path in paths}


def test_imports_go_to_the_same_floor_or_below() -> None:
    wrong = []
    for path, floor in modules_by_floor().items():
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "foveate" and len(parts) > 1 and FLOORS.get(parts[1], -1) > floor:
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_imports_inside_the_package_are_relative() -> None:
    wrong = []
    for path in modules_by_floor():
        for node in ast.walk(ast.parse((ROOT / path).read_text(), str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            # `kernels` alone is Hugging Face's package of that name
            ours = {"foveate", *FLOORS} - {"kernels"}
            wrong += [f"{path} imports {name}" for name in names if name.split(".")[0] in ours]
    assert wrong == []
