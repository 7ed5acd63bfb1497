"""Task: samples with a context, a question and an answer, by name (`build`)."""

from evomem.tasks import book, episodes, file, needles, passkey, recall, zoo, zoo_forgetting
from evomem.tasks.base import Sample, Split, Task, Tokenizer, tasks
from evomem.tasks.building import build, parse
from evomem.tasks.chance import ChanceReport, check

__all__ = [
    "ChanceReport",
    "Sample",
    "Split",
    "Task",
    "Tokenizer",
    "book",
    "build",
    "check",
    "episodes",
    "file",
    "needles",
    "parse",
    "passkey",
    "recall",
    "tasks",
    "zoo",
    "zoo_forgetting",
]
