"""The house's rules, read from the source by ast, so also inside functions and under TYPE_CHECKING.

1. An import goes to its own wing or to a strictly lower floor. Agents and environments are strangers, and reports
   import no agent.
2. No circle between files.
3. No `_name` of another module's object, ours or a library's, but for PRIVATE.
4. A wing has at most 12 files.
5. Inside the package an import names the module that holds what is needed, never a wing's face.
6. No function is longer than 60 lines (tests/test_style.py).
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

# The floors of the house, lowest first: root modules and wings.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"extras", "lazy"}),
    frozenset({"bounds", "console", "core", "functional", "kl", "files", "processes", "stats"}),
    frozenset({"registry", "data", "models", "persistence", "worlds"}),
    frozenset({"conversations", "policy", "questions"}),
    frozenset({"llm"}),
    frozenset({"rewards"}),
    frozenset({"judges", "mdp"}),
    frozenset({"rollouts", "envs"}),
    frozenset({"evaluation", "pipeline"}),
    frozenset({"training"}),
    frozenset({"feedback", "integrations"}),
    frozenset({"experiments"}),
    frozenset({"charts", "recipes"}),
    frozenset({"agents", "reports"}),
    frozenset({"web"}),
    frozenset({"cli", "__main__"}),
)
ROOT_MODULES = frozenset({"core", "functional", "kl", "files", "processes"})  # they may import each other
FORBIDDEN = {("agents", "envs"), ("envs", "agents"), ("reports", "agents")}  # who never imports whom
PLUGINS = frozenset({"agents", "envs", "rewards"})  # a file is one of a kind there, so that any number may stand
MOST_FILES = 12

KERNEL = "fused attention with its log-sum-exp, which the public function keeps to itself"
PRIVATE: dict[tuple[str, str], str] = {
    # (module, name): why there is no public way
    ("experiments.worker", "_exit"): "os._exit: sys.exit in a thread ends the thread and not the process",
    ("integrations.sb3_agent", "_setup_learn"): "what SB3's learn() does before its loop, which is ours here",
    ("integrations.sb3_agent", "_last_obs"): "where SB3's rollout goes on; it has no other way in",
    ("integrations.sb3_agent", "_last_episode_starts"): "the same",
    ("models.flops", "_linear_pointwise"): "PyTorch's operator for linear layers by oneDNN, which torch.compile calls",
    ("models.flops", "_scaled_dot_product_flash_attention_for_cpu"): KERNEL,
    ("models.flops", "_scaled_dot_product_flash_attention_for_cpu_backward"): KERNEL,
    ("models.onednn", "_linear_pointwise"): "the same; nothing public calls oneDNN for float32",
    ("policy.attention_kernels", "_scaled_dot_product_efficient_attention"): KERNEL,
    ("policy.attention_kernels", "_scaled_dot_product_efficient_attention_backward"): KERNEL,
    ("policy.attention_kernels", "_scaled_dot_product_flash_attention"): KERNEL,
    ("policy.attention_kernels", "_scaled_dot_product_flash_attention_backward"): KERNEL,
    ("policy.attention_kernels", "_scaled_dot_product_flash_attention_for_cpu"): KERNEL,
    ("policy.attention_kernels", "_scaled_dot_product_flash_attention_for_cpu_backward"): KERNEL,
    ("policy.prefix_attention", "_attn_implementation"): "set_attn_implementation() also rewrites sub-configurations",
    ("policy.step_cache", "_version"): "PyTorch's count of changes in place; nothing public tells of a step",
}

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
            if folder.name == PACKAGE and parts[0] in ("agents", "envs"):
                continue  # the committed links: read once, under agents/ and envs/
            name = ".".join((prefix, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports_of(path: Path, modules: frozenset[str]) -> list[Import]:
    """The package's modules that a file imports; `from textrl_gym import x` counts as x where x is a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            base = node.module or ""
            targets = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        found += [Import(t, node.lineno) for t in dict.fromkeys(targets) if t.split(".")[0] == PACKAGE]
    return found


def wing_of(module: str) -> str:
    """textrl_gym.rewards.rouge -> rewards; textrl_gym.core -> core."""
    return module.split(".")[1]


def height(module: str) -> int:
    """The floor that a module stands on."""
    for number, floor in enumerate(FLOORS):
        if wing_of(module) in floor:
            return number
    raise AssertionError(
        f"{module} stands on no floor: put it into a wing, or add {wing_of(module)!r} to FLOORS in this file"
    )


def assert_directions(graph: dict[str, list[Import]]) -> None:
    """Rules 1 and 5."""
    faces = {name for name in graph if name.count(".") == 1 and any(other.startswith(name + ".") for other in graph)}
    for module, imports in graph.items():
        if module == PACKAGE:
            continue  # test_package_loads_only_the_registry_at_once
        height(module)
        for imported in imports:
            where = f"{module}, line {imported.line}, imports {imported.target}"
            plugins_face = imported.target == f"{PACKAGE}.rewards"  # load_reward lives in the folder's __init__
            if imported.target == PACKAGE or (imported.target in faces and not plugins_face):
                raise AssertionError(f"{where}: name the module that holds what you need, not the package")
            pair = wing_of(module), wing_of(imported.target)
            assert pair not in FORBIDDEN, f"{where}: {pair[0]}/ and {pair[1]}/ are strangers"
            same = pair[0] == pair[1] or set(pair) <= ROOT_MODULES or pair == ("__main__", "cli")
            low, high = height(imported.target), height(module)
            assert same or low < high, f"{where}: imports point down, from floor {high} to floor {low} is not"


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


def private_names(source: str) -> Iterator[tuple[str, int]]:
    """Rule 3: every `x._name` and `from m import _name` that this module does not define itself, and its line."""
    tree = ast.parse(source)
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.asname is None or not alias.name.startswith("__")]
        elif isinstance(node, ast.Attribute) and not is_self(node.value):
            names = [node.attr]
        else:
            continue
        for name in names:
            if name.startswith("_") and not name.startswith("__") and name not in own:
                yield name, node.lineno


def is_self(node: ast.expr) -> bool:
    """`self`, `cls` or `super()`: what a class inherits is its own."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_imports_point_down() -> None:
    assert_directions(read_graph(ROOT))


def test_no_circles() -> None:
    graph = read_graph(ROOT)
    del graph[PACKAGE]  # the public names; nobody imports them from there
    circle = find_circle(graph)
    assert not circle, "imports run in a circle: " + " -> ".join(circle)


def test_nobody_uses_private_names_of_others() -> None:
    found: dict[tuple[str, str], int] = {}
    for module, path in source_files(ROOT).items():
        for name, line in private_names(path.read_text(encoding="utf-8")):
            found.setdefault((module.removeprefix(f"{PACKAGE}."), name), line)
    assert sorted(set(found) - set(PRIVATE)) == [], found
    assert sorted(set(PRIVATE) - set(found)) == [], "exceptions that nobody needs any more"


def test_wings_are_small() -> None:
    for wing in (ROOT / PACKAGE).iterdir():
        if wing.is_dir() and wing.name not in PLUGINS:
            files = [path.name for path in wing.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= MOST_FILES, f"{wing.name}/ has {len(files)} files: {sorted(files)}"


def test_every_wing_says_what_is_in_it() -> None:
    for wing in (ROOT / PACKAGE).iterdir():
        if wing.is_dir() and (wing / "__init__.py").is_file() and wing.name not in PLUGINS:
            text = ast.get_docstring(ast.parse((wing / "__init__.py").read_text(encoding="utf-8"))) or ""
            missing = [p.stem for p in wing.glob("*.py") if p.name != "__init__.py" and f"- `{p.stem}`: " not in text]
            assert missing == [], f"{wing.name}/__init__.py does not name {missing}"


def test_package_loads_only_the_registry_at_once() -> None:
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_once = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    assert {module for module in at_once if module and module.startswith(PACKAGE)} <= {PACKAGE, f"{PACKAGE}.lazy"}


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
    "textrl_gym/registry.py": "from textrl_gym import files\n",
    "textrl_gym/files.py": "",
    "textrl_gym/core.py": "",
    "textrl_gym/kl.py": "from textrl_gym.core import Rollout\n",
    "textrl_gym/models/__init__.py": "",
    "textrl_gym/models/loading.py": "from textrl_gym.models import tiny\n",
    "textrl_gym/models/tiny.py": "",
    "textrl_gym/data/__init__.py": "",
    "textrl_gym/data/prompts.py": "",
    "textrl_gym/reports/page.py": "",
    "textrl_gym/cli/main.py": "from textrl_gym import kl\nfrom textrl_gym.agents import ppo\n",
    "agents/ppo.py": "from textrl_gym import kl, core\nfrom textrl_gym.models.loading import load_model\n",
    "envs/copy_text.py": "import textrl_gym.core\n",
}


def test_sound_house_passes(tmp_path: Path) -> None:
    assert_house(build(tmp_path, SOUND))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("textrl_gym/core.py", "from textrl_gym import registry", "imports point down"),
        ("textrl_gym/core.py", "def f():\n    import textrl_gym.cli.main", "imports point down"),
        ("textrl_gym/core.py", "if TYPE_CHECKING:\n    from textrl_gym.cli.main import main", "imports point down"),
        ("textrl_gym/core.py", "from textrl_gym.agents.ppo import PPO", "imports point down"),
        ("textrl_gym/data/prompts.py", "from textrl_gym.models.loading import load_model", "imports point down"),
        ("textrl_gym/data/prompts.py", "from textrl_gym import registry", "imports point down"),
        ("envs/copy_text.py", "from textrl_gym.agents.ppo import PPO", "are strangers"),
        ("agents/ppo.py", "def f():\n    from textrl_gym.envs import copy_text", "are strangers"),
        ("textrl_gym/reports/page.py", "from textrl_gym.agents.ppo import PPO", "are strangers"),
        ("textrl_gym/core.py", "import textrl_gym.kl", "circle"),
        ("textrl_gym/models/tiny.py", "def f():\n    from textrl_gym.models import loading", "circle"),
        ("textrl_gym/models/tiny.py", "if TYPE_CHECKING:\n    from textrl_gym.models import loading", "circle"),
        ("textrl_gym/kl.py", "from . import core", "relative import"),
        ("textrl_gym/kl.py", "from textrl_gym import Rollout", "name the module"),
        ("agents/ppo.py", "from textrl_gym.models import load_model", "name the module"),
        ("textrl_gym/novelty.py", "", "add 'novelty' to FLOORS"),
        ("agents/new.py", "from textrl_gym import novelty", "name the module"),
    ],
)
def test_faults_are_seen(tmp_path: Path, name: str, text: str, message: str) -> None:
    root = build(tmp_path, SOUND | {name: text})
    with pytest.raises(AssertionError, match=message):
        assert_house(root)


def test_private_names_are_seen() -> None:
    source = """
from torch import _C
class A:
    def f(self, other):
        self._own = other._own          # another object of this class
        return other._theirs, self._inherited, super()._g(), other.__dict__
"""
    assert [name for name, _ in private_names(source)] == ["_C", "_theirs"]
