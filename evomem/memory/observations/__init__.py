"""Memory: the observations that a layer records for its manager, in step with its slots: one class, one name each.

========================  ==================================================================================
name                      what ``LayerView.recorded`` holds
========================  ==================================================================================
``attention_sum``         (batch, kv_heads, slots): attention paid to the slot by all queries so far
``attention_spectrum``    (batch, kv_heads, slots, 17): moving average of the attention's spectrogram (NAMM)
``window_attention:W``    (batch, kv_heads, slots): mean attention of the row's last W queries, over the slots held
                          now (fewer queries while fewer were read)
``window_statistics:W``   (batch, kv_heads, slots, 4): of the same attention the maximum, the minimum, the sum, and the
                          sum in which the n-th query from the end (n = 0 is the last) counts 0.9^n
``window_peak:W``         (batch, kv_heads, slots): the same queries, but of each the *largest* attention that a query
                          head of the group pays, summed over the queries (KVP, arXiv 2602.10238)
``window_next_use:W``     (batch, kv_heads, slots) fp32: which of the same queries (0 is the first) is the
                          first in which a query head of the group pays the slot at least `USED`; W if none does
``window_entropy:W``      (batch, kv_heads, slots): the slot's part -a log a of the same queries' entropy, in nats,
                          their mean
``window_variance:W``     (batch, kv_heads, slots): unbiased variance of the attention over the same queries
``window_group_peak:W``   (batch, kv_heads, slots): mean attention of the same queries, of the query head of the group
                          for which it is the largest
``query_statistics``      ``query_mean`` (batch, query_heads, head_dim), ``query_covariance`` (…, head_dim, head_dim) of
                          the queries before rotation, without a row's first 4; ``future_rotation`` (batch, head_dim,
                          head_dim), the mean rotation of the next 512 positions
``tri_attention``         (batch, kv_heads, slots): worth to the model's mean query from some distances on, which is
                          measured once a model; the largest of the group's query heads, standardised (arXiv 2604.04921)
``repeated_attention``    (batch, kv_heads, slots): largest attention paid to the slot while the context is read again,
                          which `SlotCache.repeat` has the model do (KVzip, arXiv 2505.23416)
``probe_logits:W``        (batch, query_heads, slots, W): logits that at most W queries, evenly spread over the text,
                          give the slots when they are asked again at the positions that come next
``frequency``             (batch, kv_heads, slots): reads received, the sum of the attention paid to the slot
``frequency_decayed:H``   (batch, kv_heads, slots): the same, a read of n tokens ago counting 2^(-n/H)
``recency``               (batch, kv_heads, slots) int64: tokens since the slot was last read, or else written
``relevance:W``           (batch, kv_heads, slots): mean cosine of the slot's key with the row's last W queries
``distinct_rate:W``       (batch, kv_heads): share of the latest reads whose key is among none of the W reads before;
                          explicit memories only
``effective_writes``      (batch, kv_heads): effective number of writes so far, weak ones counted as little as they
                          weigh; memory matrices only
``ghost_frequency``       (batch, kv_heads, slots): reads of the slot's name since it was first stored, those before it
                          left and while it was away included; pair memories that are read by name only
``backward_distance:W``   (batch, kv_heads, slots) int64: tokens since the last read but one of the slot's name, at most
                          W (LRU-2), counted on likewise; pair memories that are read by name only
``surprise``              (batch, kv_heads, slots): error of what the memory predicted when the slot was written;
                          explicit memories only
``change``                (batch, kv_heads, slots): size of the slot's latest update beside what it held, or of what
                          a token teaches beside what the memory says of its key; feedback and neural memory only
``agreement``             (batch, kv_heads, slots): cosine of the old and the new; feedback and neural memory only
``updates``               (batch, kv_heads, slots): updates that the slot was offered so far; feedback memory only
``surprise_ratio``        (batch, kv_heads, slots): how much of a surprise the token is beside those before; neural
                          memory only
``gates``                 (batch, kv_heads, slots, 3): log-odds of the token's α, η and θ; neural memory only
========================  ==================================================================================

To add one, copy `evomem.memory.observations.attention_sum` and import it here.
"""

from evomem.memory.observations import (
    attention_spectrum,
    attention_sum,
    distinct_rate,
    effective_writes,
    gates,
    ghosts,
    matching,
    probe_logits,
    query_statistics,
    reads,
    repeated_attention,
    tri_attention,
    updates,
    window_spread,
    windows,
)
from evomem.memory.observations.base import (
    Moment,
    Observation,
    Sizes,
    Wanted,
    Window,
    axes_of,
    known_specs,
    observations,
    parse_observation,
    register_observation,
)
from evomem.memory.observations.query_statistics import FUTURE, SINKS
from evomem.memory.observations.recorder import Recorder
from evomem.memory.observations.windows import FADING, USED

__all__ = [
    "FADING",
    "FUTURE",
    "SINKS",
    "USED",
    "Moment",
    "Observation",
    "Recorder",
    "Sizes",
    "Wanted",
    "Window",
    "attention_spectrum",
    "attention_sum",
    "axes_of",
    "distinct_rate",
    "effective_writes",
    "gates",
    "ghosts",
    "known_specs",
    "matching",
    "observations",
    "parse_observation",
    "probe_logits",
    "query_statistics",
    "reads",
    "register_observation",
    "repeated_attention",
    "tri_attention",
    "updates",
    "window_spread",
    "windows",
]
