"""Record what the code of commit 1ffdb50 decides: plug-ins of schema 1, decisions, runs, search spaces, drivers.

It runs at that commit only, whose modules it imports: what later code does is held against these files, never the
files against later code. To extend them (another manager, another budget), do it there:

    git worktree add --detach ../before 1ffdb50
    cp tests/data/golden/make*.py ../before/tests/data/golden/    # with the change
    cd ../before && PYTHONPATH=.:tests python tests/data/golden/make.py DESTINATION

Every number that is drawn has a seed of its own, by name: a case that is added leaves all others as they were.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from evomem.cache import layer_view
from make_files import made_with, pack, write
from make_runs import runs, states

from evomem import plugins
from evomem.errors import ConfigError
from evomem.evaluation import EvaluationProtocol, Evaluator
from evomem.managers import build
from evomem.managers.selection import TopN, slots_of_budget
from evomem.models import LoadedModel
from evomem.search_space import SearchSpace, load_space
from evomem.tasks.base import Sample
from evomem.testing.models import tiny, tiny_tokenizer

LAYERS, BATCH, HEADS, GROUP, SLOTS, DIM = 4, 2, 2, 2, 40, 8
PADDING = 7
BUDGETS = (None, 7, 12, 20, 0.5)
FEATURES = [
    "keydiff", "valuediff", "key_norm", "value_norm", "key_step", "value_step", "age", "position", "sink", "attention",
    "attention_per_query", "window:8", "last:16", "block_max:16", "block_min:16", "block_sum:16", "block_decayed:16",
    "spectrum:0", "spectrum:4", "spectrum:16", "mean:5:keydiff", "max:3:attention", "mean:7:last:16",
]  # fmt: skip
FEW = ["keydiff", "value_norm", "age", "attention_per_query", "mean:5:last:8"]
OWN = {"layers": LAYERS, "heads": HEADS}


def policy(*actions, **options):
    return ("kv_policy", {"actions": list(actions), "features": FEW, "hidden": 3, "odds": 0.5, "rate": -1.0, **options})


def scorer(**options):
    return ("feature_scorer", {"features": FEW, "sinks": 1, "recent": 2, **options})


def adakv(inner, **options):
    name, inside = inner
    return ("adakv", {"inner": {"name": name, "options": inside}, **options})


PLUGINS = {
    "full": ("full", {}),
    "random": ("random", {"seed": 3}),
    "streaming_llm": ("streaming_llm", {}),
    "streaming_llm_every": ("streaming_llm", {"every": 16}),
    "knorm": ("knorm", {}),
    "h2o": ("h2o", {}),
    "h2o_quarter": ("h2o", {"recent": 0.25}),
    "observed_attention": ("observed_attention", {}),
    "snapkv": ("snapkv", {"window": 8, "kernel": 3}),
    "snapkv_default": ("snapkv", {}),
    "pyramidkv": ("pyramidkv", {"window": 8, "kernel": 3}),
    "pyramidkv_steep": ("pyramidkv", {"window": 8, "beta": 200.0}),
    "pyramidkv_flat": ("pyramidkv", {"window": 8, "beta": 2.5}),
    "tova": ("tova", {}),
    "keydiff": ("keydiff", {}),
    "expected_attention": ("expected_attention", {}),
    "expected_attention_other": ("expected_attention", {"epsilon": 0.3, "sinks": 2}),
    "adakv_keydiff": ("adakv(keydiff)", {}),
    "adakv_snapkv": ("adakv(snapkv(window=8), safeguard=0.5)", {}),
    "adakv_h2o": ("adakv(h2o, safeguard=0.0)", {}),
    "adakv_pyramidkv": ("adakv(pyramidkv(window=8))", {}),
    "adakv_expected_attention": ("adakv(expected_attention, safeguard=1.0)", {}),
    "adakv_feature_scorer": adakv(scorer(hidden=3)),
    "adakv_feature_scorer_shares": adakv(scorer(allocation=3)),
    "adakv_kv_policy": adakv(policy("evict", "forget")),
    "adakv_kv_policy_store": adakv(policy("store", "evict"), safeguard=1.0),
    "adakv_kv_policy_shares": adakv(policy("evict", allocation=3)),
    "namm_bam": ("namm", {}),
    "namm_bam_threshold": ("namm", {"selection": "threshold"}),
    "namm_bam_dense": ("namm", {"selection": "dense"}),
    "namm_mlp_2": ("namm", {"scorer": "mlp", "hidden": [6, 5]}),
    "namm_linear": ("namm", {"scorer": "linear", "every": 16}),
    "feature_scorer": ("feature_scorer", {"features": FEATURES}),
    "feature_scorer_one_knot": scorer(knots=1),
    "feature_scorer_hidden": scorer(hidden=3, knots=3),
    "feature_scorer_shares": scorer(allocation=3),
    "feature_scorer_share_of_one_point": scorer(allocation=1),
    "feature_scorer_heads": scorer(**OWN),
    "feature_scorer_other_heads": scorer(layers=3, heads=3),
    "feature_scorer_all": scorer(hidden=2, allocation=LAYERS, knots=3, **OWN),
    "feature_scorer_shares_floors": scorer(allocation=2, sinks=4, recent=8),
    "kv_policy_evict": policy("evict"),
    "kv_policy_store": policy("store"),
    "kv_policy_forget": policy("forget"),
    "kv_policy_evict_store": policy("evict", "store"),
    "kv_policy_evict_forget": policy("evict", "forget"),
    "kv_policy_store_forget": policy("store", "forget"),
    "kv_policy_evict_store_forget": policy("evict", "store", "forget"),
    "kv_policy_evict_shares": policy("evict", allocation=3),
    "kv_policy_store_shares": policy("store", allocation=3),
    "kv_policy_forget_shares": policy("forget", allocation=3),
    "kv_policy_evict_store_shares": policy("evict", "store", allocation=3),
    "kv_policy_evict_forget_shares": policy("evict", "forget", allocation=3),
    "kv_policy_store_forget_shares": policy("store", "forget", allocation=3),
    "kv_policy_evict_store_forget_shares": policy("evict", "store", "forget", allocation=3),
    "kv_policy_ends": policy("evict", "store", sinks=3, recent=4),
    "kv_policy_ends_shares": policy("evict", "store", allocation=2, sinks=3, recent=4),
    "kv_policy_with_age": policy("evict", "forget", fades="with_age", hidden=0),
    "kv_policy_model_scale": policy("evict", "store", "forget", scale="model", knots=3),
    "kv_policy_heads": policy("evict", "forget", allocation=2, **OWN),
    "kv_policy_default_features": ("kv_policy", {"actions": ["evict"], "hidden": 4}),
}  # fmt: skip
"""Plug-ins by name: what `build` is given."""


def generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def plug_in(name):
    """Return a manager whose parameters and statistics are drawn by its name."""
    spec, options = PLUGINS[name]
    manager = build(spec, **options)
    draw = generator(name)
    with torch.no_grad():
        for key, tensor in sorted(manager.state_dict(keep_vars=True).items()):
            drawn = torch.randn(tensor.shape, generator=draw)
            if key.endswith(("_var", "_deviation")):
                tensor.copy_(0.5 + drawn.abs())
            elif key.endswith("offset"):
                tensor.add_(0.5 * drawn)
            else:
                tensor.copy_(0.6 * drawn)
    return manager


# ---- views ---------------------------------------------------------------------------------------------------------


def made_views(names):
    """Return the tensors of two views a layer: a context that was just read, and a later decision.

    In the first every head holds all tokens; the second row is padded on the left. In the second every head holds other
    tokens, and another number of them, of 60 that were read; 16 of them are new. Numbers are those that fp16 can say.
    """
    tensors = {}
    for which in ("read", "later"):
        draw = generator(which)
        shape = (LAYERS, BATCH, HEADS, SLOTS)
        slots = torch.full(shape, -1)
        seen, fresh = (SLOTS, SLOTS) if which == "read" else (60, 16)
        for layer in range(LAYERS):
            for row, start in enumerate((0, PADDING)):
                for head in range(HEADS):
                    tokens = torch.arange(start, seen)
                    if which == "later":
                        old = torch.arange(start, seen - fresh)
                        count = int(torch.randint(8, SLOTS - fresh + 1, (), generator=draw))
                        chosen = old[torch.randperm(len(old), generator=draw)[:count]].sort().values
                        tokens = torch.cat((chosen, torch.arange(seen - fresh, seen)))
                    slots[layer, row, head, SLOTS - len(tokens) :] = tokens
        found = {"keys": torch.randn(*shape, DIM, generator=draw), "values": torch.randn(*shape, DIM, generator=draw)}
        found["keys"] = found["keys"] * (0.5 + torch.rand(*shape, 1, generator=draw))
        held = (slots >= 0)[..., None]
        for name in sorted(names):
            draw = generator(f"{which} {name}")
            if name == "query_statistics":
                heads = (LAYERS, BATCH, HEADS * GROUP)
                root = torch.randn(*heads, DIM, DIM, generator=draw) / 2
                found["query_mean"] = torch.randn(*heads, DIM, generator=draw)
                found["query_covariance"] = root @ root.mT
                found["future_rotation"] = torch.randn(LAYERS, BATCH, DIM, DIM, generator=draw) / 2
                continue
            width = {"attention_spectrum": 17, "window_statistics": 4}.get(name.partition(":")[0])
            drawn = torch.rand(*shape, *([width] if width else []), generator=draw) ** 3
            found[name] = torch.where(held if width else held[..., 0], drawn, 0.0)
        tensors[which] = {"slots": slots.to(torch.int16).numpy(), **{k: v.half().numpy() for k, v in found.items()}}
        tensors[which]["counts"] = np.array([seen, fresh], np.int16)
        tensors[which]["start"] = np.array([0, PADDING], np.int16)
    return tensors


def views(arrays):
    """Return the views, by layer."""
    seen, fresh = map(int, arrays["counts"])
    recorded = {
        name: torch.from_numpy(array).float()
        for name, array in arrays.items()
        if name not in ("slots", "counts", "start")
    }
    keys, values = recorded.pop("keys"), recorded.pop("values")
    return [
        layer_view(
            keys[layer], values[layer], torch.from_numpy(arrays["slots"][layer]).long(),
            recorded={name: tensor[layer] for name, tensor in recorded.items()},
            start=torch.from_numpy(arrays["start"]).long(), seen=seen, fresh=fresh, layer=layer, layers=LAYERS,
        )
        for layer in range(LAYERS)
    ]  # fmt: skip


# ---- decisions -----------------------------------------------------------------------------------------------------


def limits(manager, view):
    """Slots per head that the manager allows in this layer: (batch, 1, 1), or None if there is no such number."""
    if manager.name == "kv_policy":
        shares = manager.log_shares.float()[None] if manager.options.allocation else None
        return manager._limits(view, shares)[0]
    selection = manager.select()
    return selection.limit(view) if isinstance(selection, TopN) else None


def wrong(manager, seen):
    """Say why the old code is wrong about this case, or return None."""
    inner = getattr(manager, "inner", None) if manager.name == "adakv" else None
    if inner is not None and inner.name in ("feature_scorer", "kv_policy") and inner.options.allocation:
        return "adakv does not know the layers' shares, which are only in the inner manager's select() or decide()"
    if inner is not None and inner.name == "kv_policy" and "store" in inner.options.actions:
        return "adakv(kv_policy) leaves the places of refused tokens empty; kv_policy gives them to the next best"
    if inner is not None and manager.options.safeguard == 1:
        alone = inner.with_options(budget=manager.options.budget)
        if any(not torch.equal(alone.decide(view).keep, manager.decide(view).keep) for view in seen):
            return "a safeguard of 1 shares nothing, and the other heads get what a head cannot fill"
    found = [limits(manager, view) for view in seen]
    if any(limit is None for limit in found):
        return None
    if getattr(manager.options, "allocation", 0):
        total = torch.stack(found).sum(0)
        if (total != LAYERS * slots_of_budget(manager.options.budget, seen[0])).any():
            return "what a layer's floor of sinks + recent + 1 slots adds is not taken off the other layers"
        for limit, view in zip(found, seen, strict=True):
            if (limit > view.valid.sum(-1, keepdim=True).amin(1, keepdim=True)).any():
                return "a layer's share is more than the layer holds, and the other layers do not get what is over"
    return None


def decisions(folder):
    names = set().union(*(plug_in(name).observes for name in PLUGINS))
    arrays = made_views(names)
    for which, tensors in arrays.items():
        np.savez_compressed(folder / f"view_{which}.npz", **tensors)
    cases, masks, superseded, old, decays = [], [], [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in PLUGINS:
            plugins.save(plug_in(name), Path(temporary) / name, provenance={"made_by": "1ffdb50"})
            loaded = plugins.load(Path(temporary) / name)
            for budget in BUDGETS:
                if name == "full" and budget is not None:
                    continue
                try:
                    manager = loaded.with_options(budget=budget)
                except ConfigError:  # namm without a cap takes no budget
                    continue
                for which in arrays:
                    seen = views(arrays[which])
                    with torch.no_grad():
                        found = [manager.decide(view) for view in seen]
                    bits = np.packbits(torch.stack([one.keep for one in found]).numpy())
                    case = {"plugin": name, "budget": budget, "view": which}
                    why = wrong(manager, seen)
                    if why is None:
                        cases.append(case)
                        masks.append(bits)
                    else:
                        kept = [int(one.keep.sum()) for one in found]
                        superseded.append({**case, "why": why, "kept_by_layer": kept})
                        old.append(bits)
                    if found[0].decay is not None:
                        decay = torch.stack([one.decay for one in found]).numpy()
                        key = f"{name}/{which}"
                        assert (decays.setdefault(key, decay) == decay).all()
        pack(Path(temporary), folder / "plugins.zip")
    np.savez_compressed(folder / "decisions.npz", keep=np.stack(masks), **decays)
    np.savez_compressed(folder / "superseded.npz", keep=np.stack(old))
    write(folder / "decisions.json", {"made_with": made_with(), "shape": [LAYERS, BATCH, HEADS, SLOTS], "cases": cases})
    write(folder / "superseded.json", {"shape": [LAYERS, BATCH, HEADS, SLOTS], "cases": superseded})


# ---- end to end ----------------------------------------------------------------------------------------------------

ANSWERING = {
    "snapkv": 12, "h2o": 12, "adakv_keydiff": 12, "pyramidkv_flat": 12, "expected_attention": 12, "namm_linear": None,
    "feature_scorer_hidden": 0.25, "feature_scorer_shares": 8, "kv_policy_evict_store_forget": 12, "kv_policy_heads": 8,
}  # fmt: skip
"""Plug-ins that answer, and their budgets: with these no layer's share is more than 16 tokens."""
EVERY, CONTEXT = 16, 48


def answers(folder):
    """Record what a tiny model's cache holds after a padded batch was read, and how likely an answer is then."""
    model, tokenizer = tiny("llama", layers=LAYERS), tiny_tokenizer()
    draw = generator("context")
    tokens = torch.randint(6, 120, (BATCH, CONTEXT), generator=draw)
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    words = [w for w in map(tokenizer.decode, range(6, 120)) if len(tokenizer.encode(w)) == 1]
    said = [words[int(place)] for place in torch.randint(0, len(words), (CONTEXT + 9,), generator=draw)]
    texts = [" ".join(part) for part in (said[:CONTEXT], said[CONTEXT:-4], said[-4:])]
    arrays = {"tokens": tokens.to(torch.int16).numpy(), "mask": mask.to(torch.int16).numpy()}
    managers = {name: plug_in(name).requires_grad_(False).with_options(budget=b) for name, b in ANSWERING.items()}
    cases = []
    for kind in ("compress_once", "streaming"):
        evaluator = Evaluator(LoadedModel("tiny", model, tokenizer, "tiny"), EvaluationProtocol(kind=kind, every=EVERY))
        found = evaluator.evaluate(list(managers.values()), Sample("golden", *texts, (texts[2],), 4), None)
        for (name, manager), one in zip(managers.items(), found, strict=True):
            decides = manager.with_options(every=EVERY if kind == "streaming" else None)
            with torch.no_grad(), decides.attach(model) as cache, cache.reading():
                model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
            widest = max(layer.slots.shape[-1] for layer in cache.layers)
            held = [torch.nn.functional.pad(x.slots, (widest - x.slots.shape[-1], 0), value=-1) for x in cache.layers]
            arrays[f"{name}/{kind}"] = torch.stack(held).to(torch.int16).numpy()
            cases.append({
                "plugin": name, "budget": ANSWERING[name], "protocol": kind,
                "loglik": one.loglik, "slots": one.slots, "bytes_peak": one.bytes_peak, "bytes_mean": one.bytes_mean,
            })  # fmt: skip
    np.savez_compressed(folder / "answers.npz", **arrays)
    write(folder / "answers.json", {"made_with": made_with(), "every": EVERY, "texts": texts, "cases": cases})


# ---- search spaces -------------------------------------------------------------------------------------------------


def spaces(folder):
    """Record what every search space's vectors stand for: order, sizes, start, and one vector's manager by digests."""
    found = {}
    for path in sorted(Path("search_spaces").glob("*.yaml")):
        space = SearchSpace(load_space(path.stem))
        vector = np.random.default_rng(zlib.crc32(path.stem.encode())).normal(size=space.dim)
        manager = space.decode(vector)
        blocks = space.blocks()
        found[path.stem] = {
            "dim": space.dim,
            "sigma": space.sigma,
            "start": digest(space.start),
            "template": space.template.describe(),
            "parameters": [[name, list(tensor.shape)] for name, tensor in space.template.named_parameters()],
            "blocks": [len(blocks), digest(np.concatenate(blocks).astype(np.int64)) if blocks else ""],
            "variables": [repr(variable).replace("(offset=", "(place=") for variable in space.variables()],
            "options": manager.describe()["options"],
            "tensors": {name: digest(tensor.numpy()) for name, tensor in manager.state_dict().items()},
            "encoded": digest(space.encode(manager)),
        }
    write(folder / "spaces.json", found)


def digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


PARTS = {"decisions": decisions, "answers": answers, "spaces": spaces, "runs": runs, "states": states}


if __name__ == "__main__":
    torch.set_num_threads(1)
    destination = Path(sys.argv[1])
    destination.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[2:] or PARTS:
        PARTS[part](destination)
