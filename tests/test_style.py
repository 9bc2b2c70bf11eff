"""Style that the whole package keeps: types, lengths of functions, comments. Read from the source."""

import ast
import io
import tokenize
from collections.abc import Collection, Iterator
from pathlib import Path

LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> dict[str, str]:
    """Path -> source of every module of the package, agents and environments."""
    files = [p for p in (root / "textrl_gym").rglob("*.py") if not {"agents", "envs"} & set(p.relative_to(root).parts)]
    files += [*(root / "agents").glob("*.py"), *(root / "envs").glob("*.py")]
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sorted(files)}


def functions(source: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            yield node


def aliases_of_any(source: str) -> set[str]:
    """Names that a module gives to Any: they are no less bare."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {ast.unparse(node.targets[0]) for node in assigned if ast.unparse(node.value) == "Any"}


def bare_any(source: str, aliases: Collection[str] = ()) -> tuple[list[bool], list[bool]]:
    """For each annotated parameter, and for each annotated return, whether it is a bare Any."""

    def is_bare_any(annotation: ast.expr | None) -> bool:
        return annotation is not None and ast.unparse(annotation) in {"Any", *aliases}

    parameters, returns = [], []
    for function in functions(source):
        of = function.args
        named = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
        parameters += [is_bare_any(arg.annotation) for arg in named if arg.annotation is not None]
        returns += [is_bare_any(function.returns)] if function.returns is not None else []
    return parameters, returns


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def comment_density(sources: list[str]) -> float:
    """Comment lines, at the end of code lines too, per 100 lines that hold code."""
    comments = code = 0
    for source in sources:
        documented = docstring_lines(source)
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                # What tools read, and rulers between sections, tell a reader nothing.
                comments += not token.string.startswith(("# --", "# type:", "# noqa", "# fmt:"))
            elif token.type not in (
                tokenize.NL,
                tokenize.NEWLINE,
                tokenize.INDENT,
                tokenize.DEDENT,
                tokenize.ENDMARKER,
            ):
                lines |= set(range(token.start[0], token.end[0] + 1))
        code += len(lines - documented)
    return 100 * comments / code


def docstring_lines(source: str) -> set[int]:
    """Lines of strings that stand alone: docstrings of modules, classes, functions and fields."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            found |= set(range(node.lineno, node.end_lineno + 1))
    return found


def test_few_parameters_and_returns_are_any(root: Path) -> None:
    parameters: list[bool] = []
    returns: list[bool] = []
    worst: dict[str, int] = {}
    aliases = set().union(*map(aliases_of_any, sources(root).values()))
    for path, source in sources(root).items():
        of_parameters, of_returns = bare_any(source, aliases)
        worst[path] = sum(of_parameters) + sum(of_returns)
        parameters, returns = parameters + of_parameters, returns + of_returns
    message = f"most in {sorted(worst.items(), key=lambda item: -item[1])[:8]}"
    assert share(parameters) < 0.03, message
    assert share(returns) < 0.02, message


def test_no_function_is_longer_than_60_lines(root: Path) -> None:
    long = {}
    for path, source in sources(root).items():
        for function in functions(source):
            assert function.end_lineno is not None
            if (lines := function.end_lineno - function.lineno + 1) > 60:
                long[f"{path}:{function.name}"] = lines
    assert long == {}


def test_comments_give_reasons(root: Path) -> None:
    assert comment_density(list(sources(root).values())) >= 4.0


# The measures themselves, on small sources.


def test_bare_any_is_counted() -> None:
    source = "def f(a: Any, b: int, *c: Any, **d: dict[str, Any]) -> Any: ...\ndef g(e: str) -> None: ...\n"
    # a, b, *c, **d of f; e of g
    assert bare_any(source) == ([True, False, True, False, False], [True, False])


def test_an_alias_of_any_is_counted() -> None:
    source = "Batch = Any\ndef f(a: Batch) -> int: ...\n"
    assert bare_any(source, aliases_of_any(source)) == ([True], [False])


def test_comments_are_counted() -> None:
    source = (
        '"""A module."""\nx = 1  # why\n# more\ny = (\n    2\n)\n# -- ruler ----\n\n\ndef f() -> None:\n    """It."""\n'
    )
    # code: x, the three lines of y, the def; comments: "why" and "more"
    assert comment_density([source]) == 100 * 2 / 5
