"""Task: samples with a context, a question and an answer, by name (`build`)."""

from evomem.tasks.base import Sample, Split, Task, Tokenizer, tasks
from evomem.tasks.building import build, parse
from evomem.tasks.chance import ChanceReport, check
from evomem.tasks.episodes import acting
from evomem.tasks.streams import noisy_recall, overwrites, regbench, switches, zipf
from evomem.tasks.text import book, file, needles, passkey, recall, zoo, zoo_forgetting

__all__ = [
    "ChanceReport",
    "Sample",
    "Split",
    "Task",
    "Tokenizer",
    "acting",
    "book",
    "build",
    "check",
    "file",
    "needles",
    "noisy_recall",
    "overwrites",
    "parse",
    "passkey",
    "recall",
    "regbench",
    "switches",
    "tasks",
    "zipf",
    "zoo",
    "zoo_forgetting",
]
