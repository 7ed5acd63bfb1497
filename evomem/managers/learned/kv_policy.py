"""Manager: a small policy that evicts, stores and forgets, to be trained by policy gradient or by evolution.

Sources: KVP (arXiv 2602.10238) for eviction as a ranking of all slots, good for any budget; ForesightKV (arXiv
2602.03203) for a small network over attention statistics; Plackett-Luce rankings in `evomem.managers.plackett_luce`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from evomem.bounds import TOKENS
from evomem.errors import ConfigError
from evomem.managers import plackett_luce
from evomem.managers.base import register
from evomem.managers.decision import Judgement, arrived
from evomem.managers.features import FeatureOptions, columns, required, standardise
from evomem.managers.learned.feature_scorer import interpolate
from evomem.managers.selection import Ends
from evomem.managers.stochastic import COMMON, Action, Noise, StochasticManager
from evomem.managers.vector import normal, zeros
from evomem.memory import LayerView

ActionName = Literal["evict", "store", "forget"]
POLICY_FEATURES = (
    "key_norm", "value_norm", "keydiff", "valuediff", "key_step", "value_step", "age", "sink",
    "attention", "attention_per_query", "last:8", "last:16", "last:32",
    "block_max:64", "block_min:64", "block_sum:64", "block_decayed:64",
    "mean:3:keydiff", "mean:3:value_norm", "mean:7:keydiff", "mean:7:valuediff", "mean:7:value_norm",
    "mean:7:attention_per_query", "max:7:keydiff", "max:7:value_norm", "mean:21:keydiff", "mean:21:value_norm",
    "max:21:keydiff",
)  # fmt: skip
"""Norms, rarity, age, the sinks, attention over several spans, and what stands around a slot."""
LARGEST = 10.0
"""Standardised features are cut here, so that a model with outliers cannot drive a policy that never saw them."""
SPREAD = 0.5
"""Standard deviation of the drawn log-rates of forgetting around their mean."""
SHARE_SPREAD = 0.2
"""Standard deviation of the drawn log-shares of the budget around theirs."""
AGE = 64
"""Tokens after which a slot that fades with age has faded by exp(o_forget)."""


@register("kv_policy")
class KVPolicy(StochasticManager):
    """A policy over scale-preserving features: scores to rank slots by, log-odds to store, log-rates to forget.

    With z the standardised features, d the relative depth, and one output per action a:

        o_a = w_a(d)·z + Σ_h A_ah tanh(b_h + B_h d + Σ_f W_hf z_f) + c_a   (evict: + own weights of the head · z)

    *Evict*: rankings are Plackett-Luce in o_evict, and any budget keeps the ranking's beginning; deployed, the plain
    order. *Store*: a new token enters memory with probability σ(o_store); deployed, if o_store >= 0. *Forget*: a slot's
    attention logit is lowered by exp(u), u normal around o_forget; deployed, exp(o_forget). With ``fades: with_age`` it
    is lowered by exp(u) age / 64: one number is then enough for the newer of two statements to win. With ``allocation``
    the layers share the budget unequally (`DepthShares`); their log-shares are drawn around the parameters.

    Features are *of* slots (log-norms, not normalised keys: norms carry signal) and know no head size, head count or
    vocabulary. Standardised within each head (``scale: head``) they made better rankings on SmolLM2; with one mean and
    deviation for the whole model (``scale: model``, measured by `calibrate`) levels stay comparable between heads.
    """

    class Options(FeatureOptions):
        """Options of `KVPolicy`."""

        actions: tuple[ActionName, ...] = Field(("evict",), description="any of evict, store, forget")
        features: tuple[str, ...] = Field(
            POLICY_FEATURES, max_length=1024, description="what each slot is described by; see `evomem list`"
        )
        scale: Literal["model", "head"] = Field(
            "head", description="features are standardised within heads, or with one mean and deviation for the model"
        )
        hidden: int = Field(16, ge=0, le=4096, description="units of the network's one hidden layer; 0: linear")
        knots: int = Field(2, ge=1, le=4096, description="points of depth at which the linear weights are given")
        allocation: Annotated[int, Field(ge=0, le=64)] | dict[str, Any] | None = Field(
            0,
            description="points of depth at which the layers' shares of the budget are learned (0: equal shares), or "
            "an allocation, e.g. pyramid(beta=20)",
        )
        draws: Literal["kept", "evicted"] = Field(
            "kept",
            description="what is drawn one after another while it is trained: the slots that stay, or those that leave "
            "(less noise where few leave a decision)",
        )
        odds: float = Field(3.0, ge=-20, le=20, description="log-odds of storing at first, before training")
        rate: float = Field(-6.0, ge=-20, le=4, description="logarithm of how fast slots fade at first, in nats")
        fades: Literal["at_once", "with_age"] = Field(
            "at_once", description="exp(o_forget) is taken off a logit, or that for every 64 tokens of the slot's age"
        )
        sinks: int = Field(0, ge=0, le=TOKENS, description="first tokens that are always kept")
        recent: int = Field(0, ge=0, le=TOKENS, description="newest tokens that are always kept")

        @field_validator("actions")
        @classmethod
        def _some(cls, names: tuple[ActionName, ...]) -> tuple[ActionName, ...]:
            if not names or len(set(names)) < len(names):
                raise ValueError("name at least one action, and none twice")
            return names

    options: Options
    head_parameters: ClassVar[frozenset[str]] = frozenset({"own"})
    parameter_options: ClassVar[frozenset[str]] = frozenset({"actions", "fades", "features", "knots", "scale"})
    calibrates: ClassVar[bool] = True
    on_view_device: ClassVar[frozenset[str]] = StochasticManager.on_view_device | {"outputs"}
    feature_mean: Tensor
    feature_deviation: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        o = self.options
        count, outputs = len(o.features), len(o.actions)
        self.weights = zeros(outputs, o.knots, count)
        if o.hidden:
            # Random inside, zero outside: the network says nothing at first, and every unit can learn something else.
            # Always the same numbers, so that a policy is a pure function of its options and its vector.
            generator = torch.Generator("cpu").manual_seed(0)
            self.inner = nn.Parameter(normal(generator, o.hidden, count) / math.sqrt(count))
            self.by_depth = nn.Parameter(normal(generator, o.hidden))
            self.bias = zeros(o.hidden)
            self.outer = zeros(outputs, o.hidden)
        if o.layers:
            self.own = zeros(o.layers, o.heads, count)
        if (shares := self.allocation.take_shares()) is not None:
            if len(shares) > COMMON:
                raise ConfigError(f"manager 'kv_policy': allocation: {len(shares)} points of depth; at most {COMMON}")
            self.log_shares = shares
        # Of the ranking no constant matters. By default everything is stored at first, and nothing fades to speak of.
        # What a change of o_forget does is in proportion to exp(o_forget): a search for rates should begin higher up.
        starts = {"store": o.odds, "forget": o.rate}
        others = [starts[name] for name in o.actions if name in starts]
        if others:
            self.offset = nn.Parameter(torch.tensor(others, dtype=torch.float32))
        self.register_buffer("feature_mean", torch.zeros(count, dtype=torch.float32))
        self.register_buffer("feature_deviation", torch.ones(count, dtype=torch.float32))

    @property
    def observes(self) -> frozenset[str]:
        """What the declared features need."""
        return required(self.options.features)

    @property
    def uses_statistics(self) -> bool:
        """Whether features are standardised by mean and deviation of the whole model."""
        return self.options.scale == "model"

    def make_ends(self) -> Ends:
        """The first and the newest tokens."""
        return Ends(self.options.sinks, self.options.recent)

    def shares(self) -> Tensor | None:
        """Return the learned log-shares, which are parameters of the policy itself."""
        return self.log_shares.float()[None] if "log_shares" in self._parameters else None

    STARTS: ClassVar[dict[str, str]] = {
        "keydiff": "keydiff", "knorm": "-key_norm", "h2o": "attention", "observed_attention": "attention_per_query",
        "streaming_llm": "-age", "lru": "-recency", "lfu": "frequency", "fifo": "-age",
    }  # fmt: skip
    """Heuristics that a search may start from: the one feature, with its sign, that each is made of."""
    SHARPNESS: ClassVar[float] = 2.0
    """How decided a policy is that starts from a heuristic: weight of the feature, in its standard deviations."""

    @classmethod
    def start_from(cls, heuristic: str, **options: Any) -> Self:
        """Return a policy that ranks as ``heuristic`` does, up to the protected ends.

        Raises
        ------
        ConfigError : no single feature ranks as it does, or it is not among the options' features.
        """
        if heuristic not in cls.STARTS:
            raise ConfigError(f"kv_policy cannot start from {heuristic!r}; it can from {', '.join(cls.STARTS)}")
        manager = cls(**options)
        feature = cls.STARTS[heuristic]
        sign, name = (-1.0, feature[1:]) if feature.startswith("-") else (1.0, feature)
        if name not in manager.options.features or "evict" not in manager.options.actions:
            raise ConfigError(f"to start from {heuristic!r} the policy must evict, and its features contain {name!r}")
        with torch.no_grad():
            output = manager.options.actions.index("evict")
            manager.weights[output, :, manager.options.features.index(name)] = sign * cls.SHARPNESS
        return manager

    # ---- statistics -----------------------------------------------------------------------------------------------

    def calibrate(self, views: Iterable[LayerView]) -> None:
        """Set mean and deviation of every feature over the slots of some contexts, all layers and heads together.

        Raises
        ------
        ConfigError : no slot to measure.
        """
        count, total = 0, torch.zeros((), dtype=torch.float64, device="cpu")
        square = total
        for view in views:
            rows = torch.stack(columns(view, self.options.features), -1)[view.valid].double().cpu()
            count, total, square = count + len(rows), total + rows.sum(0), square + rows.square().sum(0)
        if not count:
            raise ConfigError("kv_policy: no slot to collect statistics from; give at least one context")
        mean = total / count
        self.feature_mean.copy_(mean)
        self.feature_deviation.copy_((square / count - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3))

    # ---- the network ----------------------------------------------------------------------------------------------

    def outputs(self, view: LayerView) -> dict[str, Tensor]:
        """Return o_a (batch, kv_heads, slots) fp32 by action."""
        o = self.options
        raw = view.once(("policy", o.scale, *o.features), lambda: self._columns(view))
        z = raw if o.scale == "head" else (raw - self.feature_mean.float()) / self.feature_deviation.float()
        z = z.clamp(-LARGEST, LARGEST)
        relative_depth = view.depth + 0.5 if view.layers > 1 else 0.0
        weights = torch.stack([interpolate(own, relative_depth) for own in self.weights.float().unbind(0)])
        stacked = torch.matmul(z, weights.transpose(0, 1))
        if o.hidden:
            depth = self.by_depth.float() * view.depth
            units = torch.tanh(torch.matmul(z, self.inner.float().transpose(0, 1)) + self.bias.float() + depth)
            stacked = stacked + torch.matmul(units, self.outer.float().transpose(0, 1))
        outputs: dict[str, Tensor] = dict(zip(map(str, o.actions), stacked.unbind(-1), strict=True))
        if o.layers and "evict" in outputs:
            own = interpolate(self.own.float(), relative_depth)
            own = own if own.shape[0] == z.shape[1] else own.mean(0, keepdim=True)
            outputs["evict"] = outputs["evict"] + torch.matmul(z, own[..., None])[..., 0]
        for number, name in enumerate(name for name in o.actions if name != "evict"):
            outputs[name] = outputs[name] + self.offset[number].float()
        return outputs

    def _columns(self, view: LayerView) -> Tensor:
        features = columns(view, self.options.features)
        if self.options.scale == "head":
            features = [standardise(column, view.valid) for column in features]
        return torch.stack(features, -1)

    def score(self, view: LayerView) -> Tensor:
        """Return the scores that slots are ranked by; without the action evict, the newest come first."""
        outputs = self.outputs(view)
        return outputs["evict"] if "evict" in outputs else -view.age.float()

    def admit(self, view: LayerView) -> Tensor | None:
        """Return the log-odds of storing."""
        return self.outputs(view).get("store")

    def decay(self, view: LayerView) -> Tensor | None:
        """Return what is added to the slots' attention logits, as ``fades`` says."""
        rates = self.outputs(view).get("forget")
        return None if rates is None else self.log_decays(view, rates)

    @property
    def forgets(self) -> bool:
        """Whether the action forget is among its actions."""
        return "forget" in self.options.actions

    # ---- decisions ------------------------------------------------------------------------------------------------

    def judge(self, view: LayerView) -> Judgement:
        """Return all that the network says, which runs once."""
        outputs = self.outputs(view)
        scores = outputs["evict"] if "evict" in outputs else -view.age.float()
        odds, rates = outputs.get("store"), outputs.get("forget")
        decay = None if rates is None else self.log_decays(view, rates)
        return Judgement(scores, None if odds is None else odds >= 0, decay, self.shares())

    def require_draws(self) -> None:
        """Raise `ConfigError` if decisions cannot be drawn with this allocation."""
        if "evict" in self.options.actions:
            self.rule.require_rankings()
        super().require_draws()

    def draw(self, view: LayerView, noise: Noise) -> Action:
        """Return a random action."""
        outputs = self.outputs(view)
        stored = ranking = rates = shares = None
        if (mean := self.shares()) is not None:
            shares = mean + SHARE_SPREAD * noise.common[:, : mean.shape[-1]]
        if "store" in outputs:
            stored = outputs["store"] + noise.logistic(view.slots) > 0
        if "evict" in outputs:
            scores, _ = self.rule.open(outputs["evict"], view, stored, shares)
            gumbel = noise.gumbel(view.slots)
            if self.options.draws == "kept":
                ranking = torch.argsort(scores + gumbel, dim=-1, descending=True, stable=True)
            else:  # from the last place on; what may not leave, or not stay, is dealt with by the rule
                ranking = torch.argsort(_reversed(scores) + gumbel, dim=-1, descending=True, stable=True).flip(-1)
        if "forget" in outputs:
            rates = outputs["forget"] + SPREAD * noise.normal(view.slots)
        return Action(ranking, stored, rates, shares)

    def log_probs(self, view: LayerView, action: Action) -> Tensor:
        """Return log π of every pick, gate, rate and share: (batch, kv_heads, choices), 0 where there is no choice."""
        return torch.cat(self._terms(view, action), -1)

    def log_prob(self, view: LayerView, action: Action) -> Tensor:
        """Return log π(action | view): (batch, kv_heads); the parts add up."""
        total = torch.zeros((), device=view.slots.device, dtype=torch.float32)
        for terms in self._terms(view, action):
            total = total + terms.sum(-1)
        return total

    def _terms(self, view: LayerView, action: Action) -> list[Tensor]:
        """Return log π of the choices of every part of an action: each (batch, kv_heads, choices)."""
        outputs, log_probs = self.outputs(view), list[Tensor]()
        if action.stored is not None:
            terms = plackett_luce.bernoulli_log_prob(outputs["store"], action.stored)
            log_probs.append(torch.where(arrived(view), terms, 0.0))
        if action.ranking is not None:
            shares = self.shares() if action.shares is None else action.shares
            scores, picks = self.rule.open(outputs["evict"], view, action.stored, shares)
            ranking = action.ranking
            if self.options.draws == "evicted":
                picks = self._leaving(scores, picks)
                scores, ranking = _reversed(scores), ranking.flip(-1)
            log_probs.append(plackett_luce.log_probs(scores.expand_as(ranking), ranking, picks))
        if action.rates is not None:
            z = (action.rates - outputs["forget"]) / SPREAD
            terms = -0.5 * z.square() - math.log(SPREAD * math.sqrt(2 * math.pi))
            log_probs.append(torch.where(view.valid, terms, 0.0))
        mean = self.shares()
        if action.shares is not None and mean is not None and view.layer == 0:  # drawn once for all: counted once
            z = (action.shares - mean) / SHARE_SPREAD
            terms = -0.5 * z.square() - math.log(SHARE_SPREAD * math.sqrt(2 * math.pi))
            log_probs.append(torch.nn.functional.pad(terms[:, None], (0, 0, 0, view.slots.shape[1] - 1)))
        return log_probs

    def choices(self, view: LayerView, action: Action) -> Tensor:
        """Return the number of picks, gates and rates that were drawn: (batch, kv_heads)."""
        total = torch.zeros((), device=view.slots.device, dtype=torch.float32)
        if action.stored is not None:
            total = total + arrived(view).sum(-1)
        if action.ranking is not None:
            nothing = torch.zeros(action.ranking.shape, device=view.slots.device, dtype=torch.float32)
            shares = self.shares() if action.shares is None else action.shares
            scores, picks = self.rule.open(nothing, view, action.stored, shares)
            drawn = torch.minimum(picks, torch.isfinite(scores).sum(-1))
            total = total + (drawn if self.options.draws == "kept" else self._leaving(scores, picks))
        if action.rates is not None:
            total = total + view.valid.sum(-1)
        return total

    def _leaving(self, scores: Tensor, picks: Tensor) -> Tensor:
        """Return how many slots are drawn that leave: (batch, kv_heads), what may leave less what stays of it.

        Without a budget everything is ranked, as it is where those that stay are drawn.
        """
        may_leave = torch.isfinite(scores).sum(-1)
        return may_leave if self.options.budget is None else (may_leave - picks).clamp(min=0)

    def log_decays(self, view: LayerView, rates: Tensor) -> Tensor:
        """Return what log-rates (batch, kv_heads, slots) add to the slots' attention logits: nothing or less."""
        amount = torch.exp(rates.clamp(max=4.0))
        return -amount * view.age.clamp(min=0) / AGE if self.options.fades == "with_age" else -amount


def _reversed(scores: Tensor) -> Tensor:
    """Return scores by which slots leave: -scores, and -inf where nothing is decided (-inf in ``scores``)."""
    return torch.where(torch.isfinite(scores), -scores, -torch.inf)
