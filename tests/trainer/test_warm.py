"""What the fork server imports for the trainer, for real: that it may be forked at all, and computes as a fresh process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

COMPUTE = """
def computed():
    import torch
    before = len(os.listdir("/proc/self/task"))
    a = torch.rand(600, 600, requires_grad=True)
    (a @ a).exp().sum().backward()
    return [torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before]
"""

FORKED = f"""
import json, os, sys
{COMPUTE}
from finetune_trainer import __main__ as program, warm
warm.load()
refusals = [warm.refusal(), len(os.listdir("/proc/self/task"))]
program.main = lambda: print(json.dumps([*refusals, warm.refusal(), *computed()]), flush=True) or 0
if pid := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.environ["OMP_NUM_THREADS"] = "3"
os._exit(warm.main())
"""

FRESH = f"""
import json, os
{COMPUTE}
import torch
print(json.dumps(computed()), flush=True)
"""


def run(code: str, **environment: str) -> list:
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'trainer'}", **environment}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    return json.loads(ended.stdout)


def test_the_imports_start_no_thread_and_no_cuda_and_a_child_has_the_threads_of_a_fresh_process() -> None:
    refusal, threads, refusal_in_child, *computed = run(FORKED, OMP_NUM_THREADS="2")
    assert (refusal, threads, refusal_in_child) == ("", 1, "")
    assert computed == run(FRESH, OMP_NUM_THREADS="3")
    assert computed[0] > 1
