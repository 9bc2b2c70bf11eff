"""axe-core, which checks pages by the rules of WCAG 2.2 AA, finds nothing on any page that is written or served."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_label_report
import test_report
import test_watch
from chromium import Browser, axe_script, violations
from servers import running
from test_comparison_page import write_comparison

from textrl_gym.cli.main import main
from textrl_gym.reports import comparison_page, labels_page, run_page
from textrl_gym.web import watch

LOOKS = [(1280, 900, False), (1280, 900, True), (390, 844, False), (390, 844, True)]
"""Width, height and dark colours: a desktop and a phone."""
OPEN_ALL = "for (const part of document.querySelectorAll('details')) part.open = true"

SCHEME = """(async () => {{
  if (!document.body.dataset.mdColorScheme) return;
  document.body.dataset.mdColorScheme = "{}";
  await new Promise((done) => setTimeout(done, 500));
}})()"""
"""The documentation's theme keeps the colours of the first visit, and goes from one colour to another in steps."""


def comparison(folder: Path) -> str:
    return f"file://{comparison_page.comparison_report(write_comparison(folder / 'comparison'))}"


def several_runs(folder: Path) -> str:
    rows = [test_report.START, test_report.evaluation(100, gold=0.2), test_report.evaluation(200, gold=0.1)]
    runs = [test_report.write_run(folder / name, rows) for name in ("ppo", "grpo")]
    return f"file://{run_page.report(runs, folder / 'runs.html')}"


def suite(folder: Path) -> str:
    out = folder / "suite"
    flags = ["--agents", "random", "reference", "--seeds", "2", "--total-timesteps", "1", "--eval-episodes", "4"]
    assert main(["compare", "CopyText-v0", "KnownOptimum-v0", *flags, "--out", str(out)]) == 0
    return f"file://{out / 'report.html'}"


def labels(folder: Path) -> str:
    file = test_label_report.write(
        folder / "labels.jsonl", test_label_report.crowd({"ann": 1.0, "bob": 0.6}, 40, models=True)
    )
    labels_page.labels_report(file, folder / "labels.html")
    return f"file://{folder / 'labels.html'}"


PAGES = {"comparison": comparison, "runs": several_runs, "suite": suite, "labels": labels}


def check(browser: Browser, address: str, script: str, name: str) -> Iterator[str]:
    """What is found on a page in each of the looks, with all that can be unfolded open."""
    for width, height, dark in LOOKS:
        browser.look(width, height, dark)
        browser.open(address)
        browser.run(OPEN_ALL)
        browser.run(SCHEME.format("slate" if dark else "default"))
        yield from violations(browser, script, f"{name}, {width} pixels, {'dark' if dark else 'light'}")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_violation(name: str, tmp_path: Path) -> None:
    script, address = axe_script(), PAGES[name](tmp_path)
    with Browser(tmp_path / "profile") as browser:
        found = list(check(browser, address, script, name))
    assert found == [], "\n".join(found)


@pytest.mark.slow
def test_a_page_that_is_watched_has_no_violation(tmp_path: Path) -> None:
    script, runs, alone = axe_script(), tmp_path / "runs", tmp_path / "alone"
    found: list[str] = []
    with Browser(tmp_path / "profile") as browser:
        with running(watch.make_server(alone)) as server:
            address = f"http://127.0.0.1:{server.port}/"
            found += check(browser, address, script, "waits for a folder")
            alone.mkdir()
            test_watch.evaluate(alone, 0, 0.25)
            test_watch.update(alone, 100, 0.5)
            found += check(browser, address, script, "a run")
        runs.mkdir()
        with running(watch.make_server(test_watch.write_comparison(runs))) as server:
            address = f"http://127.0.0.1:{server.port}/"
            found += check(browser, address, script, "a comparison")
            test_watch.write_run(runs, "alpha-0", 0.5)
            found += check(browser, address, script, "a comparison of which a run is done")
    assert found == [], "\n".join(found)


THEME = "landmark-unique"
"""Material for MkDocs gives the buttons that copy code, and its menus, the same names."""


@pytest.mark.slow
def test_the_documentation_has_no_violation_of_its_own(tmp_path: Path, root: Path) -> None:
    script, site = axe_script(), tmp_path / "site"
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(site)], cwd=root, env=quiet, check=True)
    pages = ["index.html", "quickstart.html", "kl.html", "performance.html", "benchmark.html", "gallery/Tool-v0.html"]
    pages += [
        "lecture/06-token-mdp.html",
        "lecture/11-clipping.html",
        "algorithms/policy-gradient.html",
        "api/core/kl.html",
    ]
    found: list[str] = []
    with Browser(tmp_path / "profile") as browser:
        for page in pages:
            found += check(browser, f"file://{site / page}", script, page)
            assert browser.run("document.documentElement.scrollWidth") <= LOOKS[-1][0], f"{page} scrolls sideways"
    found = [one for one in found if THEME not in one]
    assert found == [], "\n".join(found)
