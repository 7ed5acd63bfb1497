"""Memory: explicit memories, which a model reads and writes beside its attention, as layers of a cache.

=====================  ============================================================================================
`ExplicitLayer`        the protocol: view, `keep`, `decay`, rows, bytes, state; a memory adds how it is read and written
`ExplicitCache`        the memories of all layers, and when a manager decides about them
`PairMemory`           pairs of a key and a value, read by name or by a softmax; a manager decides how many there are
=====================  ============================================================================================
"""

from evomem.memory.explicit.cache import ExplicitCache
from evomem.memory.explicit.layer import ExplicitLayer
from evomem.memory.explicit.pairs import PairMemory, Reads

__all__ = ["ExplicitCache", "ExplicitLayer", "PairMemory", "Reads"]
