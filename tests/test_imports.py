"""Imports point down, and never in a circle. Read from the source by ast, so also inside functions."""

import ast
import dataclasses
from pathlib import Path

import pytest

# The floors of the house, lowest first: root modules and wings. An import goes to its own wing or to a lower floor.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"bounds", "core", "functional", "kl", "files", "lazy", "stats"}),
    frozenset({"registry", "data", "models", "worlds"}),
    frozenset({"policy"}),
    frozenset({"rewards"}),
    frozenset({"judges", "mdp"}),
    frozenset({"rollouts", "envs"}),
    frozenset({"evaluation", "pipeline"}),
    frozenset({"training"}),
    frozenset({"integrations", "experiments"}),
    frozenset({"agents", "reports"}),
    frozenset({"cli", "__main__"}),
)
STRANGERS = frozenset({"envs", "agents"})  # these two never import each other

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "textrl_gym"


@dataclasses.dataclass(frozen=True)
class Import:
    """One import statement's target: a dotted module of the package, and where it is written."""

    target: str
    line: int


def source_files(root: Path) -> dict[str, Path]:
    """Module name -> file, with agents/ and envs/ under the names they are installed as."""
    found: dict[str, Path] = {}
    for folder, prefix in (
        (root / PACKAGE, PACKAGE),
        (root / "agents", f"{PACKAGE}.agents"),
        (root / "envs", f"{PACKAGE}.envs"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if folder.name == PACKAGE and parts[0] in STRANGERS:
                continue  # the committed links: read once, under agents/ and envs/
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Every import under a node, at any depth, except under `if TYPE_CHECKING`."""
    found: list[ast.Import | ast.ImportFrom] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append(child)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                found += [other] if isinstance(other, ast.Import | ast.ImportFrom) else statements(other)
        else:
            found += statements(child)
    return found


def imports_of(path: Path, modules: frozenset[str]) -> list[Import]:
    """The package's modules that a file imports; `from textrl_gym import x` counts as x where x is a module."""
    found = []
    for node in statements(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            base = node.module or ""
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
        else:
            targets = [alias.name for alias in node.names]
        found += [Import(t, node.lineno) for t in dict.fromkeys(targets) if t.split(".")[0] == PACKAGE]
    return found


def floor_name(module: str) -> str:
    """textrl_gym.rewards.rouge -> rewards; textrl_gym.core -> core."""
    return module.split(".")[1]


def height(module: str) -> int:
    """The floor that a module stands on."""
    for number, floor in enumerate(FLOORS):
        if floor_name(module) in floor:
            return number
    raise AssertionError(
        f"{module} stands on no floor: add {floor_name(module)!r} to FLOORS in tests/test_imports.py, on the lowest "
        f"floor whose modules and those below it are all that it imports"
    )


def assert_directions(graph: dict[str, list[Import]]) -> None:
    """Every import goes to the same floor or below; agents/ and envs/ are strangers."""
    for module, imports in graph.items():
        if module == PACKAGE:
            continue  # test_package_loads_only_plugins_at_once
        height(module)
        for imported in imports:
            where = f"{module}, line {imported.line}, imports {imported.target}"
            if imported.target == PACKAGE:
                raise AssertionError(f"{where}: name the module that holds what you need, not the package")
            pair = {floor_name(module), floor_name(imported.target)}
            assert pair != STRANGERS, f"{where}: agents/ and envs/ never import each other"
            low, high = height(imported.target), height(module)
            assert low <= high, f"{where}: imports point down, from floor {high} to floor {low} is up"


def find_circle(graph: dict[str, list[Import]]) -> list[str]:
    """A circle of imports as [a, b, ..., a], or an empty list."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for imported in graph.get(module, []):
            circle = walk(imported.target, [*trail, module])
            if circle:
                return circle
        done.add(module)
        return []

    for module in graph:
        circle = walk(module, [])
        if circle:
            return circle
    return []


def read_graph(root: Path) -> dict[str, list[Import]]:
    files = source_files(root)
    return {name: imports_of(path, frozenset(files)) for name, path in files.items()}


def test_imports_point_down() -> None:
    assert_directions(read_graph(ROOT))


def test_no_circles() -> None:
    circle = find_circle(read_graph(ROOT))
    assert not circle, "imports run in a circle: " + " -> ".join(circle)


def test_package_loads_only_plugins_at_once() -> None:
    path = ROOT / PACKAGE / "__init__.py"
    targets = {i.target for i in imports_of(path, frozenset(source_files(ROOT)))}
    assert targets == {f"{PACKAGE}.registry"}


# The rules themselves, on small houses: each fault must be seen, and a sound house must pass.


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def assert_house(root: Path) -> None:
    graph = read_graph(root)
    assert_directions(graph)
    circle = find_circle(graph)
    assert not circle, "imports run in a circle: " + " -> ".join(circle)


SOUND = {
    "textrl_gym/__init__.py": "from textrl_gym import registry\n",
    "textrl_gym/registry.py": "",
    "textrl_gym/core.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from textrl_gym.cli import main\n",
    "textrl_gym/kl.py": "from textrl_gym.core import Rollout\n",
    "textrl_gym/cli/main.py": "from textrl_gym import kl\nfrom textrl_gym.agents import ppo\n",
    "agents/ppo.py": "from textrl_gym import kl, core\n",
    "envs/copy_text.py": "import textrl_gym.core\n",
}


def test_sound_house_passes(tmp_path: Path) -> None:
    assert_house(build(tmp_path, SOUND))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("textrl_gym/core.py", "from textrl_gym import registry", "imports point down"),
        ("textrl_gym/core.py", "def f():\n    import textrl_gym.cli.main", "imports point down"),
        ("textrl_gym/core.py", "from textrl_gym.agents.ppo import PPO", "imports point down"),
        ("envs/copy_text.py", "from textrl_gym.agents.ppo import PPO", "never import each other"),
        ("agents/ppo.py", "def f():\n    from textrl_gym.envs import copy_text", "never import each other"),
        (
            "textrl_gym/core.py",
            "import textrl_gym.functional",
            "circle",
        ),
        ("textrl_gym/kl.py", "from . import core", "relative import"),
        ("textrl_gym/kl.py", "from textrl_gym import Rollout", "name the module"),
        ("textrl_gym/novelty.py", "", "add 'novelty' to FLOORS"),
        ("agents/new.py", "from textrl_gym import novelty", "name the module"),
    ],
)
def test_faults_are_seen(tmp_path: Path, name: str, text: str, message: str) -> None:
    extra = {"textrl_gym/functional.py": "def f():\n    from textrl_gym import core\n"}
    root = build(tmp_path, SOUND | extra | {name: text})
    with pytest.raises(AssertionError, match=message):
        assert_house(root)
