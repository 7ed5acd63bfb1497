"""What the cache records equals what full attention, NumPy and torch.stft say, however it was cut or padded."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evomem.errors import ConfigError, UnsupportedModelError
from evomem.managers import Schedule, build
from evomem.memory import Decision, LayerView, SlotCache, attached
from evomem.memory.observations import USED, Sizes, observations, parse_observation
from evomem.memory.observations.probe_logits import NEAR
from evomem.testing.comparing import random_rows, read
from evomem.testing.conformance import check_evicted_is_hidden, check_row_alone
from evomem.testing.models import FAMILIES, tiny
from evomem.testing.reference import Batch, Tracing, explicit_biases, explicit_pass

ALL = (
    "attention_sum",
    "attention_spectrum",
    "window_attention:5",
    "window_attention:1",
    "window_statistics:5",
    "window_peak:5",
    "window_next_use:5",
    "window_entropy:5",
    "window_variance:5",
    "window_group_peak:5",
    "query_statistics",
    "tri_attention",
    "frequency",
    "frequency_decayed:7",
    "recency",
    "relevance:5",
    "probe_logits:6",
)
EXPLICIT = {"backward_distance", "distinct_rate", "effective_writes", "ghost_frequency", "surprise"}
EXPLICIT |= {"change", "agreement", "updates", "surprise_ratio", "gates"}
"""Observations that no KV cache has; tests/memory/explicit tries them."""
REPEATED = {"repeated_attention"}
"""Observations of a second reading; tests/memory/test_repeating.py tries them."""


@pytest.mark.parametrize("spec", ALL)
def test_an_observation_by_itself_is_what_it_is_beside_others(spec: str) -> None:
    """Whatever a cache has to know of the model for one of them, it does not know because of another one."""
    model = tiny("llama", layers=1)
    batch, policy = Batch.of(random_rows(model, [40, 31], 4)), Dropping(drop=False)
    (together,) = observe(model, policy, batch, [40])[1]
    policy.observes = frozenset({spec})
    (alone,) = observe(model, policy, batch, [40])[1]
    for name, tensor in alone.recorded.items():
        torch.testing.assert_close(tensor, together.recorded[name], equal_nan=True)


def test_every_observation_is_tried():
    assert set(observations.names()) <= {spec.partition(":")[0] for spec in ALL} | EXPLICIT | REPEATED, (
        "write a new observation into ALL"
    )


@pytest.mark.parametrize("spec", ALL)
def test_an_observation_has_the_axes_and_the_state_that_it_says(spec: str) -> None:
    model = tiny("llama", layers=1)
    batch, observation = Batch.of(random_rows(model, [40, 31], 4)), parse_observation(spec)
    dropping = Dropping(every=12)
    dropping.observes = frozenset({spec})
    tracing = Tracing(dropping)
    cache, views = observe(model, tracing, batch, [17, 23])
    view, layer = views[0], cache.layers[0]
    rows, heads, slots, size = view.keys.shape
    sizes = {"batch": rows, "kv_heads": heads, "slots": slots, "head_dim": size}
    sizes["query_heads"] = model.config.num_attention_heads
    named = {n: tuple(sizes[a] if isinstance(a, str) else a for a in axes) for n, axes in observation.axes().items()}
    assert {name: tuple(tensor.shape) for name, tensor in view.recorded.items()} == named
    assert {n: tuple(t.shape) for n, t in observation.example(sizes, torch.Generator()).items()} == named
    recorder = layer.recorder.whole(layer.storage.layout)
    tensors = {f"slotwise.{n}": t for n, t in recorder.slotwise.items()}
    tensors |= {f"rowwise.{n}": t for n, t in recorder.rowwise.items() if n not in ("queries", "visible")}
    says = observation.state(tensors, Sizes(rows, heads, slots, size, view.seen, layer.starts))
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == says


class Dropping:
    """Evicts every third token of each KV head, shifted by head; fades by age if asked."""

    observes = frozenset(ALL)

    def __init__(self, every: int | None = None, fade: bool = False, drop: bool = True) -> None:
        self.schedule, self.fade, self.drop = Schedule(every), fade, drop

    def decide(self, view: LayerView) -> Decision:
        heads = torch.arange(view.slots.shape[1])[:, None]
        keep = ((view.position + heads) % 3 != 0) | (not self.drop)
        return Decision(keep & view.valid, -0.1 * view.position.float() if self.fade else None)


def observe(model, policy, batch: Batch, pieces: list[int]) -> tuple[SlotCache, list[LayerView]]:
    with attached(model):
        cache = SlotCache.for_model(model, policy)
        with cache.reading():  # a manager that decides once would otherwise stop observing after the first piece
            read(model, cache, batch, pieces)
            return cache, [layer.view() for layer in cache.layers]


def slow_spectrum(signal: np.ndarray) -> np.ndarray:
    """signal (queries,): attention to one key by its row's queries; moving average of |STFT| as in the paper."""
    whole = torch.tensor(np.concatenate((np.zeros(16), signal[: len(signal) // 16 * 16])))
    if len(whole) < 32:
        return np.zeros(17)
    window = torch.hann_window(32, periodic=True, dtype=torch.float64)
    frames = torch.stft(whole, 32, 16, window=window, center=False, onesided=True, return_complex=True).abs()
    gamma = 0.99**16
    average = np.zeros(17)
    for frame in frames.T.numpy():
        average = gamma * average + (1 - gamma) * frame
    return average


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[50], [7, 1, 25, 16, 1]])
def test_attention_observations_equal_full_attention(family: str, pieces: list[int]) -> None:
    model = tiny(family, layers=2)
    batch = Batch.of(random_rows(model, [50, 37, 3], 3))
    tracing = Tracing(Dropping(every=19))
    _, views = observe(model, tracing, batch, pieces)
    biases = explicit_biases(tracing.events, batch, 2, views[0].slots.shape[1], 19)
    _, attention, _ = explicit_pass(model, batch, biases)
    for view, full in zip(views, attention, strict=True):
        check_attention(view, full.double().numpy(), batch)


def check_attention(view: LayerView, full: np.ndarray, batch: Batch) -> None:
    for row, head, at in view.valid.nonzero().tolist():
        token, start = int(view.slots[row, head, at]), int(batch.start[row])
        column = full[row, head, start:, token]
        assert float(view.recorded["attention_sum"][row, head, at]) == pytest.approx(column.sum(), abs=2e-5)
        assert float(view.recorded["frequency"][row, head, at]) == pytest.approx(column.sum(), abs=2e-5)
        fading = column * 2.0 ** (-np.arange(len(column))[::-1] / 7)
        assert float(view.recorded["frequency_decayed:7"][row, head, at]) == pytest.approx(fading.sum(), abs=2e-5)
        if np.abs(column - USED).min() > 1e-5:
            used = np.nonzero(column >= USED)[0] + start
            last = max(token, used.max(initial=token))
            assert int(view.recorded["recency"][row, head, at]) == view.seen - 1 - last
        got = view.recorded["attention_spectrum"][row, head, at].numpy()
        np.testing.assert_allclose(got, slow_spectrum(column), atol=2e-5)
    for width in (1, 5):
        got = view.recorded[f"window_attention:{width}"]
        for row in range(len(got)):
            for head in range(got.shape[1]):
                held = view.slots[row, head][view.valid[row, head]].numpy()
                last = full[row, head, max(view.seen - width, int(batch.start[row])) :]
                # Attention over what is held now: renormalised per query. (Exact for one query head per KV head; with
                # more, the mean over heads comes last, so those are compared in another test.)
                assert float(got[row, head].sum()) == pytest.approx(1.0 if len(held) and len(last) else 0.0, abs=1e-5)


@pytest.mark.parametrize(("family", "window"), [("gpt2", None), ("gpt_neox", None), ("mistral", None), ("mistral", 11)])
@pytest.mark.parametrize("fade", [False, True])
def test_window_attention_is_the_softmax_over_the_slots_held_now(family: str, window: int | None, fade: bool) -> None:
    overrides = {} if family != "mistral" else {"sliding_window": window, "num_key_value_heads": 4}
    model = tiny(family, layers=2, **overrides)
    batch = Batch.of(random_rows(model, [40, 31], 4))
    tracing = Tracing(Dropping(every=12, fade=fade))
    cache, views = observe(model, tracing, batch, [40])
    biases = explicit_biases(tracing.events, batch, 2, views[0].slots.shape[1], 12)
    _, _, queries = explicit_pass(model, batch, biases)
    for layer, view, query in zip(cache.layers, views, queries, strict=True):
        got = view.recorded["window_attention:5"].numpy()
        for row in range(2):
            for head in range(got.shape[1]):
                paid = np.zeros((5, view.slots.shape[2]))
                check_relevance(view, row, head, query[row, head, 35:40].double())
                for index in range(35, 40):
                    logits = np.full(paid.shape[1], -np.inf)
                    for at in range(paid.shape[1]):
                        token = int(view.slots[row, head, at])
                        if 0 <= token <= index and (window is None or token > index - window):
                            product = query[row, head, index].double() @ view.keys[row, head, at].double()
                            logits[at] = float(product) * layer.scale
                            logits[at] += 0.0 if layer.decays is None else float(layer.decays[row, head, at])
                    if np.isfinite(logits).any():
                        weights = np.exp(logits - logits.max())
                        paid[index - 35] = weights / weights.sum()
                np.testing.assert_allclose(got[row, head], paid.sum(0) / 5, atol=1e-5)
                fading = sum(0.9 ** (4 - n) * paid[n] for n in range(5))
                slow = np.stack([paid.max(0), paid.min(0), paid.sum(0), fading], axis=-1)
                np.testing.assert_allclose(view.recorded["window_statistics:5"][row, head], slow, atol=1e-5)
                np.testing.assert_allclose(view.recorded["window_peak:5"][row, head], paid.sum(0), atol=1e-5)
                check_next_use(view.recorded["window_next_use:5"][row, head].numpy(), paid)
                check_spread(view, row, head, paid[None])


def check_relevance(view: LayerView, row: int, head: int, queries: torch.Tensor) -> None:
    """queries (queries, head_dim) of the only query head: their mean cosine with the key of every slot held."""
    for at in view.valid[row, head].nonzero()[:, 0].tolist():
        key = view.keys[row, head, at].double()
        cosines = [float(query @ key / query.norm() / key.norm()) for query in queries]
        assert float(view.recorded["relevance:5"][row, head, at]) == pytest.approx(np.mean(cosines), abs=1e-5)


def check_spread(view: LayerView, row: int, head: int, paid: np.ndarray) -> None:
    """paid (query heads of the group, queries, slots): entropy and variance head by head, then the group's mean."""
    parts = -paid * np.log(np.where(paid > 0, paid, 1))
    slow = {
        "window_entropy:5": parts.mean(1).mean(0),
        "window_variance:5": paid.var(1, ddof=min(1, paid.shape[1] - 1)).mean(0),
        "window_group_peak:5": paid.mean(1).max(0),
    }
    for name, expected in slow.items():
        np.testing.assert_allclose(view.recorded[name][row, head], expected, atol=1e-5)


def check_next_use(got: np.ndarray, paid: np.ndarray) -> None:
    """paid (queries, slots) is what the most attentive head of the group pays; shares near the threshold may fall."""
    for at, column in enumerate(paid.T):
        if np.abs(column - USED).min() > 1e-5:
            assert got[at] == next((n for n, share in enumerate(column) if share >= USED), len(paid))


@pytest.mark.parametrize(("family", "window"), [("qwen2", None), ("gemma", None), ("mistral", 11)])
def test_peak_and_next_use_take_the_largest_of_the_group(family: str, window: int | None) -> None:
    """Against a whole eager run of grouped heads, rows of unequal length, one shorter than the window of queries."""
    model = tiny(family, layers=2, **({} if window is None else {"sliding_window": window}))
    batch = Batch.of(random_rows(model, [40, 31, 3], 4))
    _, views = observe(model, Dropping(drop=False), batch, [13, 27])
    model.set_attn_implementation("eager")
    for row, length in enumerate((40, 31, 3)):
        attentions = model(batch.ids[row : row + 1, 40 - length :], output_attentions=True).attentions
        for view, full in zip(views, attentions, strict=True):
            kv_heads = view.slots.shape[1]
            assert full.shape[1] > kv_heads
            grouped = full[0].view(kv_heads, -1, length, length)[:, :, -5:].numpy()
            for head in range(kv_heads):
                paid = np.zeros((grouped.shape[2], 40))
                paid[:, 40 - length :] = grouped[head].max(0)
                np.testing.assert_allclose(view.recorded["window_peak:5"][row, head], paid.sum(0), atol=1e-5)
                each = np.zeros((grouped.shape[1], len(paid), 40))
                each[:, :, 40 - length :] = grouped[head]
                check_spread(view, row, head, each)
                if len(paid) == 5:
                    check_next_use(view.recorded["window_next_use:5"][row, head].numpy(), paid)
                else:  # 5 means never, however few queries there were
                    got = view.recorded["window_next_use:5"][row, head].numpy()
                    assert not (got == len(paid)).any()
                    check_next_use(np.where(got == 5, len(paid), got), paid)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pieces", [[50], [2, 1, 30, 17]])
def test_query_statistics_equal_those_of_the_projections(family: str, pieces: list[int]) -> None:
    model = tiny(family, layers=2)
    batch = Batch.of(random_rows(model, [50, 33], 6))
    tracing = Tracing(Dropping(every=19))
    _, views = observe(model, tracing, batch, pieces)
    # The projection's output is the query before rotation: caught by a hook during the slow pass.
    caught: list[torch.Tensor] = []
    names = ("q_proj", "c_attn")
    hooks = [
        module.register_forward_hook(lambda _, __, out: caught.append(out.detach()))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in names
    ]
    biases = explicit_biases(tracing.events, batch, 2, views[0].slots.shape[1], 19)
    explicit_pass(model, batch, biases)
    for hook in hooks:
        hook.remove()
    for view, out in zip(views, caught, strict=True):
        queries = out[..., :64].view(2, 50, 4, 16).double().numpy()
        for row in range(2):
            own = queries[row, int(batch.start[row]) + 4 :]
            for head in range(4):
                mean = view.recorded["query_mean"][row, head].numpy()
                covariance = view.recorded["query_covariance"][row, head].numpy()
                np.testing.assert_allclose(mean, own[:, head].mean(0), atol=1e-4)
                np.testing.assert_allclose(covariance, np.cov(own[:, head].T, bias=True), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("pieces", [[50], [2, 1, 30, 17]])
def test_probes_are_queries_of_the_text_asked_again_behind_it(family: str, pieces: list[int]) -> None:
    """Every eighth of 48 queries: the power of two for which they are at most 6; 33 have 5 of them, 6 have all."""
    model, lengths = tiny(family, layers=2), (48, 33, 6)
    batch = Batch.of(random_rows(model, list(lengths), 6))
    pieces = [*pieces[:-1], pieces[-1] - 2]
    tracing = Tracing(Dropping(every=19))
    _, views = observe(model, tracing, batch, pieces)
    caught: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: caught.append(out.detach()))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("q_proj", "c_attn")
    ]
    explicit_pass(model, batch, explicit_biases(tracing.events, batch, 2, views[0].slots.shape[1], 19))
    for hook in hooks:
        hook.remove()
    for view, out in zip(views, caught, strict=True):
        queries = out[..., :64].view(len(lengths), 48, 4, 16).transpose(1, 2)
        for row, (length, stride) in enumerate(zip(lengths, (8, 8, 1), strict=True)):
            start, index = int(batch.start[row]), torch.arange(0, length, stride)
            asked = queries[row : row + 1, :, start + index]
            if family == "llama":
                cos, sin = model.model.rotary_emb(asked, length + torch.arange(len(index))[None])
                asked, _ = apply_rotary_pos_emb(asked, asked, cos, sin)
            got = view.recorded["probe_logits:6"][row]
            assert torch.isneginf(got[..., len(index) :]).all()
            for head in range(4):
                kv = head * view.keys.shape[1] // 4
                expected = asked[0, head] @ view.keys[row, kv].T / 4
                token = view.slots[row, kv] - start
                hidden = (view.slots[row, kv] < 0) | ((token - index[:, None]).abs() < 8)
                expected = expected.masked_fill(hidden, -torch.inf)
                torch.testing.assert_close(got[head, :, : len(index)].T, expected, atol=1e-4, rtol=1e-4)


def test_probes_of_a_second_reading_do_not_look_at_themselves() -> None:
    """A cache that observes again begins with its second reading; fp64 is decided in fp32."""
    model, ids = tiny("llama", layers=1).double(), torch.arange(40)[None] + 8
    ids, mask = ids.repeat(2, 1), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :5] = 0
    manager = build("refit(keydiff, probes=32)")
    with manager.attach(model) as cache:
        model(ids[:, :16], attention_mask=mask[:, :16], past_key_values=cache)
        with cache.reading():
            model(ids[:, 16:], attention_mask=mask, past_key_values=cache)
            view = cache.layers[0].view()
    slots, probes = view.slots[:, :1], torch.arange(16, 40)
    hidden = (slots[..., None] < 0) | ((slots[..., None] - probes).abs() < NEAR)
    shown = torch.isneginf(view.recorded["probe_logits:32"][..., :24])
    assert torch.equal(shown, hidden.expand_as(shown))


def test_future_rotation_is_the_mean_of_the_next_rotations() -> None:
    model = tiny("llama", layers=1)
    batch = Batch.of(random_rows(model, [30, 12], 7))
    _, (view,) = observe(model, Dropping(drop=False), batch, [30])
    for row, read_tokens in enumerate((30, 12)):
        positions = torch.arange(read_tokens, read_tokens + 512)[None]
        vector = torch.randn(1, 1, 1, 16)
        cos, sin = model.model.rotary_emb(vector, positions)
        turned, _ = apply_rotary_pos_emb(vector.expand(1, 1, 512, 16), vector, cos, sin)
        got = view.recorded["future_rotation"][row] @ vector.flatten()
        torch.testing.assert_close(got, turned.mean(2).flatten(), atol=1e-5, rtol=0)


def gemma3():
    """One full and two sliding layers, whose rotations have other frequencies."""
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, sliding_window=64, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).train(False)


@pytest.mark.parametrize("pieces", [[50], [2, 1, 30, 17]])
def test_a_rotary_embedding_per_layer_type(pieces: list[int]) -> None:
    """Gemma 3 normalises the projection; what comes out of that is the query before rotation."""
    policy = Dropping(drop=False)
    policy.observes = frozenset(ALL) - {"tri_attention"}  # for which the model reads texts of its own
    model, caught = gemma3(), dict[int, list[torch.Tensor]]({0: [], 1: [], 2: []})
    batch = Batch.of(random_rows(model, [50, 33], 6))
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_norm.register_forward_hook(lambda _, __, out, n=number: caught[n].append(out.detach()))
    _, views = observe(model, policy, batch, pieces)
    for view, kind in zip(views, model.config.layer_types, strict=True):
        queries = torch.cat(caught[view.layer], 2).double().numpy()
        for row, read_tokens in enumerate((50, 33)):
            own = queries[row, :, int(batch.start[row]) + 4 :]
            mean, covariance = (view.recorded[f"query_{name}"][row].numpy() for name in ("mean", "covariance"))
            np.testing.assert_allclose(mean, own.mean(1), atol=1e-4)
            for head in range(4):
                np.testing.assert_allclose(covariance[head], np.cov(own[head].T, bias=True), atol=1e-3)
            vector, positions = torch.randn(1, 1, 1, 16), torch.arange(read_tokens, read_tokens + 512)[None]
            cos, sin = model.model.rotary_emb(vector, positions, kind)
            turned, _ = apply_rotary_pos_emb(vector.expand(1, 1, 512, 16), vector, cos, sin)
            got = view.recorded["future_rotation"][row] @ vector.flatten()
            torch.testing.assert_close(got, turned.mean(2).flatten(), atol=1e-5, rtol=0)
    check_evicted_is_hidden(build("expected_attention(budget=9)"), model)
    check_row_alone(build("expected_attention(budget=9)"), model)


def test_frequencies_that_cannot_be_told_apart_are_refused() -> None:
    model = gemma3()
    model.model.rotary_emb.register_buffer("third_inv_freq", torch.ones(8))
    for kind in ("full_attention", "sliding_attention"):
        delattr(model.model.rotary_emb, f"{kind}_inv_freq")
    with pytest.raises(UnsupportedModelError, match="expected_attention"):
        build("expected_attention(budget=9)").new_cache(model)
    build("knorm(budget=9)").new_cache(model)


def test_padding_and_batch_leave_observations_alone() -> None:
    model = tiny("qwen2", layers=2)
    batch = Batch.of(random_rows(model, [50, 37], 3))
    _, together = observe(model, Dropping(every=19), batch, [20, 30])
    for row in range(2):
        single = batch.row(row)
        _, alone = observe(model, Dropping(every=19), single, [single.ids.shape[1]])
        for mine, theirs in zip(together, alone, strict=True):
            for name, wanted in theirs.recorded.items():
                got = mine.recorded[name][row]
                if name.startswith("probe"):  # by query head: each group's as numbers of the KV head's slots
                    got, wanted = (x.unflatten(-3, (2, -1)).transpose(-3, -2) for x in (got, wanted))
                if not name.startswith(("query", "future")):
                    got, wanted = got[mine.valid[row]], wanted[0][theirs.valid[0]]
                else:
                    wanted = wanted[0]
                torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_long_inputs_are_observed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 queries give what one block gives."""
    from evomem.memory.kv import slot_attention as module

    model = tiny("qwen3", layers=1)
    batch = Batch.of(random_rows(model, [70, 51], 8))
    _, (wanted,) = observe(model, Dropping(drop=False), batch, [70])
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    _, (got,) = observe(model, Dropping(drop=False), batch, [70])
    for name in wanted.recorded:
        torch.testing.assert_close(got.recorded[name], wanted.recorded[name], atol=1e-5, rtol=0)


def test_attention_sum_is_conserved() -> None:
    """Every real query gives away exactly 1 in each head, while nothing is evicted."""
    model = tiny("gemma", layers=2)
    batch = Batch.of(random_rows(model, [40, 22], 9))
    _, views = observe(model, Dropping(drop=False), batch, [13, 27])
    for view in views:
        given = view.recorded["attention_sum"].sum(-1)
        torch.testing.assert_close(given, batch.real.sum(1).float()[:, None].expand_as(given), atol=1e-3, rtol=0)
        assert math.isclose(float(view.recorded["window_attention:5"].sum(-1).mean()), 1.0, abs_tol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "window_attention:0",
        "window_attention:W",
        "window_attention",
        "window_statistics:0",
        "window_peak",
        "window_next_use:x",
    ],
)
def test_unknown_observation_is_named(name: str) -> None:
    class Asking(Dropping):
        observes = frozenset({name})

    with pytest.raises(ConfigError, match="attention_spectrum"):
        SlotCache.for_model(tiny("llama", layers=1), Asking())


def test_a_cache_refuses_what_only_explicit_memories_have() -> None:
    policy = Dropping()
    policy.observes = frozenset({"surprise"})
    with pytest.raises(ConfigError, match="'surprise' needs predictions of what is written, which a KV cache does not"):
        SlotCache.for_model(tiny("llama", layers=1), policy)
