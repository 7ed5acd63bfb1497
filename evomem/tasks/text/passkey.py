"""Task: the pass key, five digits said once in a long text (Mohtashami & Jaggi 2023; InfiniteBench)."""

from __future__ import annotations

from random import Random
from typing import Literal

from pydantic import Field

from evomem.tasks.base import Sample, Split, tasks
from evomem.tasks.generated import ChatOptions, GeneratedTask
from evomem.tasks.text.needles import NOISE, Haystack, essay_haystack

PREFACE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)


class PasskeyOptions(ChatOptions):
    """Options of the pass key."""

    haystack: Literal["noise", "essay"] = Field(default="noise", description="one line repeated, or prose")
    essay: str | None = Field(
        default=None, description="text file for the essay haystack, instead of the built-in text"
    )


@tasks.register("passkey")
class Passkey(GeneratedTask[PasskeyOptions]):
    """Five digits hidden at a uniformly random place in noise (or prose)."""

    name = "passkey"
    divides = "sentences of an essay; the five digits are drawn at random in every split"
    Options = PasskeyOptions

    def sample(self, random: Random, split: Split, number: int, identity: str) -> Sample:
        """Return one sample."""
        key = str(random.randint(10_000, 99_999))
        depth = random.random()
        essay = self.options.haystack == "essay"
        haystack = essay_haystack(random, split, self.options.essay) if essay else Haystack(lambda n: NOISE)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        answer_start, answer = " The pass key is", f" {key}"

        def context(n: int) -> str:
            units = haystack.first(n)
            units.insert(int(depth * (n + 1)), needle)
            return f"{PREFACE}\n{' '.join(units) if essay else chr(10).join(units)}"

        def sample(n: int) -> Sample:
            return Sample(
                id=identity,
                context=context(n),
                question=f"\nWhat is the pass key?{answer_start}",
                answer=answer,
                references=(key,),
                max_new_tokens=self._answer_budget(answer),
                meta={"depth": round(depth, 3), "units": n},
            )

        return self._fitted(sample, haystack.unit, answer_start)
