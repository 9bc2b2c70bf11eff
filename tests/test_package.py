"""The package as built and as installed: what the folders hold is what a user gets."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.metadata import Metadata

import textrl_gym
from textrl_gym import registry
from textrl_gym.extras import install


@pytest.fixture(scope="session")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def python(code: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


def packages_on_disk(root: Path) -> dict[str, Path]:
    """Package name -> folder, for every folder with Python files, the links left out."""
    found = {"textrl_gym.agents": root / "agents", "textrl_gym.envs": root / "envs"}
    for folder, names, files in os.walk(root / "textrl_gym", followlinks=False):
        names[:] = [n for n in names if n not in ("__pycache__", "assets") and not (Path(folder) / n).is_symlink()]
        if any(f.endswith(".py") for f in files):
            found[".".join(Path(folder).relative_to(root).parts)] = Path(folder)
    return found


def test_listed_packages_are_those_on_disk(root: Path, project: dict[str, Any]) -> None:
    setuptools = project["tool"]["setuptools"]
    on_disk = packages_on_disk(root)
    assert sorted(setuptools["packages"]) == sorted(on_disk)
    assert setuptools["package-dir"] == {n: str(p.relative_to(root)) for n, p in on_disk.items()}
    for name, folder in on_disk.items():
        assert (folder / "__init__.py").is_file(), f"{name} needs an __init__.py"


@pytest.mark.parametrize("folder", ["agents", "envs"])
def test_plugin_folders_are_flat_and_linked(root: Path, folder: str) -> None:
    inner = [p.name for p in (root / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert inner == [], f"keep {folder}/ flat: setuptools packages it without its subfolders"
    link = root / "textrl_gym" / folder
    assert link.is_symlink(), f"textrl_gym/{folder} must be a link, for type checkers and editors"
    assert os.readlink(link) == f"../{folder}"


def test_every_agent_is_a_file_of_a_few_screens(root: Path) -> None:
    long = {path.name: n for path in (root / "agents").glob("*.py") if (n := len(path.read_text().splitlines())) > 200}
    assert long == {}, "what several algorithms need goes into textrl_gym/"


def test_package_data_names_the_assets(project: dict[str, Any]) -> None:
    assert project["tool"]["setuptools"]["package-data"] == {"textrl_gym": ["py.typed", "assets/**/*"]}


def test_version_is_written_once_in_two_places(project: dict[str, Any]) -> None:
    assert textrl_gym.__version__ == project["project"]["version"]


ADAPTED = {"textarena", "openenv", "verifiers", "trl", "torchrl"}
"""Extras with many dependencies, some of which exclude each other; their tests run where they are installed."""
UNTESTED = {"wandb", "trackio", "mlflow"} | ADAPTED
"""Extras that the tests do without: what talks to services, and the adapters."""


def test_constraints_meet_the_requirements(root: Path, project: dict[str, Any]) -> None:
    pins = re.findall(r"^([\w.-]+)==\S+$", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pinned = {normal(p) for p in pins}
    assert "torch==2.13.0" in (root / "constraints.txt").read_text(encoding="utf-8").split()
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *(r for name, e in extras.items() if name not in UNTESTED for r in e),
    ]
    names = {normal(re.split(r"[<>=\[]", r)[0]) for r in wanted} - {"textrl-gym"}
    assert names - pinned == set(), "every dependency that is tested is pinned"


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_import_is_light(root: Path) -> None:
    done = python("import sys, textrl_gym; print(*sys.modules)", root)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "stable_baselines3", "tokenizers", "datasets", "pandas", "rich"}
    assert heavy & set(done.stdout.split()) == set()


def test_public_names_are_not_their_modules(root: Path) -> None:
    """textrl_gym.evaluate must stay the function after someone imports the module textrl_gym.evaluate."""
    code = f"""
import importlib, inspect, textrl_gym
for name, module in {textrl_gym._HOME!r}.items():
    try:
        importlib.import_module("textrl_gym." + module)
    except ModuleNotFoundError as error:
        if error.name != "textrl_gym." + module: raise
        continue
    assert not inspect.ismodule(getattr(textrl_gym, name)), name
"""
    done = python(code, root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["agents", "envs"])
def test_plugin_folders_have_one_name(root: Path, folder: str) -> None:
    done = python(f"import {folder}", root)
    assert done.returncode != 0
    assert f"import textrl_gym.{folder}, not {folder}" in done.stderr
    assert python(f"import textrl_gym.{folder}", root).returncode == 0


@pytest.fixture(scope="session")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is made of, so that building it leaves the checkout clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, source / name)
    for name in ("textrl_gym", "agents", "envs", "tests"):
        shutil.copytree(root / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a user would get it."""
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet"]
    done = subprocess.run([*pip, "--wheel-dir", str(target), str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_source_file_and_asset(source: Path, wheel: Path) -> None:
    expected = {"textrl_gym/py.typed"}
    for name, folder in packages_on_disk(source).items():
        expected |= {f"{name.replace('.', '/')}/{p.name}" for p in folder.glob("*.py")}
    for path in (source / "textrl_gym" / "assets").rglob("*"):
        if path.is_file():
            expected.add(str(path.relative_to(source)))
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert held == expected
    for kind in ("agents", "envs"):
        for plugin in registry.names(kind):
            assert f"textrl_gym/{kind}/{plugin}.py" in held


def test_source_distribution_holds_what_the_wheel_is_made_of(source: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = python(code, source)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    made_of = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    for kind in ("agents", "envs"):  # links in the checkout
        made_of = {name.replace(f"textrl_gym/{kind}/", f"{kind}/") for name in made_of}
    assert made_of - held == set()
    # All tests or none: some would come without the helpers that they import.
    assert {name for name in held if name.startswith("tests/")} == set()


def test_metadata_are_what_an_index_takes(wheel: Path, root: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Metadata.from_email(archive.read(name), validate=True)  # raises on what an index would refuse
    assert metadata.description_content_type == "text/markdown"
    assert (metadata.description or "").strip() == (root / "README.md").read_text(encoding="utf-8").strip()


def test_wheel_names_its_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    (entry_points,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    assert "textrl-gym = textrl_gym.cli.main:main" in archive.read(entry_points).decode()
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in archive.namelist())


def test_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(site)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    code = """
import gymnasium, textrl_gym
from textrl_gym import registry
print(textrl_gym.__file__)
for kind in ("agents", "envs", "rewards"):
    print(kind, *registry.names(kind))
for env_id in registry.env_ids():
    print("spec", gymnasium.spec(env_id).id)
"""
    done = python(code, elsewhere, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(site / "textrl_gym" / "__init__.py"), "the checkout was imported, not the wheel"
    assert lines[1:4] == [" ".join((kind, *registry.names(kind))) for kind in ("agents", "envs", "rewards")]
    assert lines[4:] == [f"spec {env_id}" for env_id in registry.env_ids()]


def test_an_extra_is_installed_by_its_packages(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """textrl-gym[report] is nothing that an index knows; what it stands for is."""
    extras = project["project"]["optional-dependencies"]
    assert install("report") == "pip install " + " ".join(f"'{line}'" for line in extras["report"])
    assert install("figures") == install("report") + " 'kaleido>=1.5'"  # an extra of extras
    for extra in extras:
        assert "textrl-gym" not in install(extra), extra

    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert install("report") == "pip install '.[report]' in the checkout of textrl-gym"
