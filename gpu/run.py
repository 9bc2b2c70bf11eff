"""`make gpu`: prove, measure and write down what a GPU gives, in at most nine minutes.

    python -m gpu.run --out runs/gpu            # the whole plan (gpu/plan.py); without a GPU its small form
    python -m gpu.run --only tests decode

A GPU is at hand rarely and for minutes. So every step is a process of its own with a time limit, ended with all that
it started when the limit is over; result.json is written anew the moment a step is known; and no step's failure keeps
the next from running. A step writes its numbers as it gets them, so that one that runs out of time leaves some.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gpu.plan import BUDGET_SECONDS, GRACE_SECONDS, PLAN, Step
from textrl_gym import files

ROOT = Path(__file__).resolve().parents[1]
Status = Literal["ok", "failed", "timed out", "skipped"]

PROBE = """
import importlib.util, json, torch, transformers
cuda = torch.cuda.is_available()
print(json.dumps({
    "cuda": cuda,
    "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "trl": importlib.util.find_spec("trl") is not None,
}))
"""


def environment() -> dict[str, str]:
    """What steps see: this checkout first, then what the caller had (wheels in a folder, say)."""
    paths = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def run_limited(command: Sequence[str], seconds: float, log: Path) -> int | None:
    """The exit code of a command, with its output in a file; None where the limit ended it and all that it started."""
    # A file and not a pipe: a grandchild that holds a pipe open would keep the reader waiting.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(), start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # After a good end too: what a step left running would slow the next one.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a step's output."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def read_numbers(path: Path) -> dict[str, Any]:
    """What a step has written so far; files appear whole, so that there are no torn ones."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def why_skipped(step: Step, cuda: bool) -> str:
    """In words; "" where the step runs."""
    if step.needs and not os.environ.get(step.needs):
        return f"{step.needs} is not set"
    if not cuda and step.on_cpu is None:
        return f"no GPU here: {step.why_not}"
    return ""


def run_step(step: Step, machine: Mapping[str, Any], seconds: float, out: Path) -> dict[str, Any]:
    """Run one step, and return its record: status, reason, seconds and numbers."""
    record: dict[str, Any] = {"name": step.name, "shows": step.shows, "limit_seconds": seconds}
    if reason := why_skipped(step, machine["cuda"]):
        return record | {"status": "skipped", "reason": reason, "seconds": 0.0, "numbers": {}}
    if seconds <= 0:
        return record | {"status": "skipped", "reason": "no time is left", "seconds": 0.0, "numbers": {}}
    arguments = step.command if machine["cuda"] else step.on_cpu
    assert arguments is not None
    numbers, log = out / f"{step.name}.json", out / f"{step.name}.log"
    numbers.unlink(missing_ok=True)  # of an earlier run into the same folder
    begin = time.monotonic()
    code = run_limited(
        [sys.executable, *(str(numbers) if word == "{out}" else word for word in arguments)], seconds, log
    )
    status: Status = "timed out" if code is None else "ok" if code == 0 else "failed"
    reason = "" if machine["cuda"] or not step.why_not else f"small form: {step.why_not}"
    if status == "timed out":
        reason = f"ended at its limit of {seconds:.0f} s; the numbers are those it had by then"
    elif status == "failed":
        reason = f"exit code {code}\n{last_lines(log)}"
    took = round(time.monotonic() - begin, 1)
    return record | {"status": status, "reason": reason, "seconds": took, "numbers": read_numbers(numbers)}


def probe(out: Path) -> dict[str, Any]:
    """The machine and its libraries, asked in a process of its own: a GPU's driver can hang."""
    log = out / "probe.log"
    if run_limited([sys.executable, "-c", PROBE], 60, log) != 0:
        raise SystemExit(f"torch and transformers cannot be loaded:\n{last_lines(log)}")
    return json.loads(last_lines(log, 1))


def run(plan: Sequence[Step], out: Path, budget: float = BUDGET_SECONDS) -> dict[str, Any]:
    """Run a plan within the budget, writing out/result.json after each step; returns what is in it."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    machine = probe(out)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result: dict[str, Any] = {"date": now, "python": sys.version.split()[0], **machine, "steps": []}
    for step in plan:
        left = end - time.monotonic() - GRACE_SECONDS
        record = run_step(step, machine, min(step.seconds, left), out)
        result["steps"].append(record)
        files.write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
        print(f"{record['status']:>9}  {step.name} ({record['seconds']:.0f} s): {record['reason'] or step.shows}")
        sys.stdout.flush()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line; exits with 1 where a step failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of result.json and logs")
    names = [step.name for step in PLAN]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    args = parser.parse_args(argv)
    result = run([step for step in PLAN if step.name in args.only], args.out)
    print(f"{args.out / 'result.json'}: {result['device']}, torch {result['torch']}")
    if any(step["status"] in ("failed", "timed out") for step in result["steps"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
