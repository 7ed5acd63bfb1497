"""Evaluation: seconds that importing evomem adds for whoever uses a plug-in and has torch and transformers loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measuring import Line, Setting, line, progress

NAME = "import.seconds"
CODE = """
import time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
begin = time.perf_counter()
import evomem.managers, evomem.models, evomem.plugins
from evomem.memory import SlotCache
print(time.perf_counter() - begin)
"""


def run(setting: Setting) -> Iterator[Line]:
    """Time the imports in a fresh process each; the first one may have to compile, which the median does not see."""
    count = setting.rounds(5)
    values = []
    for done in range(1, count + 1):
        shown = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
        values.append(float(shown))
        progress(NAME, done, count, f"{values[-1]:.2f} s")
    yield line(NAME, values, "s")
