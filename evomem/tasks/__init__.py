"""Task: samples with a context, a question and an answer, by name (`build`)."""

from evomem.tasks import needles, passkey
from evomem.tasks.base import Sample, Split, Task, Tokenizer, tasks
from evomem.tasks.building import build, parse

__all__ = ["Sample", "Split", "Task", "Tokenizer", "build", "needles", "parse", "passkey", "tasks"]
