"""Manager: attention sinks and a sliding window."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from evomem.bounds import TOKENS
from evomem.managers.base import MemoryManager, register
from evomem.managers.options import ManagerOptions
from evomem.managers.selection import Ends
from evomem.memory.view import LayerView


class StreamingLLMOptions(ManagerOptions):
    """Options of `StreamingLLM`."""

    sinks: int = Field(default=4, ge=0, le=TOKENS, description="tokens kept at the beginning")


@register("streaming_llm")
class StreamingLLM(MemoryManager):
    """Keeps the first 4 tokens and the newest ones (StreamingLLM, Xiao et al., arXiv 2309.17453).

    Keys stay at the positions at which they were read; the paper's re-rotation within the window is not done.
    """

    Options = StreamingLLMOptions
    options: StreamingLLMOptions

    def make_ends(self) -> Ends:
        """The sinks."""
        return Ends(sinks=self.options.sinks)

    def score(self, view: LayerView) -> Tensor:
        """Return the negative age in tokens: (batch, kv_heads, slots) fp32."""
        return -view.age.float()
