from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import PyTorchModelHubMixin
from hypothesis import given, settings
from hypothesis import strategies as st

from evomem import plugins
from evomem.errors import CacheError, ConfigError, PluginError
from evomem.managers import FeatureScorer, KeyDiff, MemoryManager, build, managers
from evomem.memory import layer_view
from evomem.testing.models import tiny

SPECS = (
    "full",
    "snapkv(window=5, budget=7)",
    "adakv(keydiff, safeguard=0.3, budget=0.25)",
    "feature_scorer(budget=12, hidden=3, allocation=2, knots=3, features=[keydiff, 'mean:7:keydiff', 'window:8', age])",
    "namm(scorer=bam, budget=64)",
    "namm(scorer=mlp, hidden=[8, 4], every=16)",
)


def randomised(spec, seed=0):
    """The manager of a spec, every floating-point tensor (buffers too) drawn at random."""
    manager = build(spec)
    generator = torch.Generator().manual_seed(seed)
    for tensor in manager.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return manager


@pytest.fixture
def folder(tmp_path):
    plugins.save(randomised(SPECS[3]), tmp_path / "plug", {"experiment": "mine", "numbers": [1, 0.1, None]})
    return tmp_path / "plug"


@pytest.mark.parametrize("spec", SPECS)
def test_a_manager_survives_the_folder_exactly(spec, tmp_path):
    manager = randomised(spec)
    plugins.save(manager, tmp_path / "plug", {"model": {"name": "a"}, "seed": 3})
    found = plugins.read(tmp_path / "plug")
    assert found.provenance == {"model": {"name": "a"}, "seed": 3}
    assert type(found.manager) is type(manager)
    assert found.manager.describe() == manager.describe()
    assert found.manager.observes == manager.observes
    state = found.manager.state_dict()
    assert list(state) == list(manager.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in manager.state_dict().items())
    # Readers without evomem: every option is there, but an allocation only if one is given; so are all tensors.
    config = json.loads((tmp_path / "plug" / "config.json").read_text())
    own = {"allocation"} if manager.options.allocation is None else set()
    assert set(config["options"]) == set(type(manager.options).model_fields) - own
    assert set(safetensors.torch.load_file(tmp_path / "plug" / "model.safetensors")) == set(state)
    assert sorted(path.name for path in (tmp_path / "plug").iterdir()) == sorted(plugins.FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["plug"]


def test_a_loaded_manager_decides_the_same_inside_a_model(tmp_path):
    model = tiny("llama", layers=2)
    manager = randomised(SPECS[3])
    manager.save_pretrained(tmp_path / "plug")
    tokens = torch.arange(4, 44)[None]
    texts = []
    for one in (
        manager,
        MemoryManager.from_pretrained(tmp_path / "plug"),
        FeatureScorer.from_pretrained(tmp_path / "plug"),
    ):
        with one.attach(model) as cache:
            texts.append(model.generate(tokens, past_key_values=cache, max_new_tokens=4, do_sample=False))
            assert int(cache.slots_held()[0].max()) < 40
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


def edit(path, **changes):
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del data[key]
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def retensor(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def poison(value):
    def change(tensors):
        tensors["weights"].flatten()[1] = value

    return change


DAMAGE = {
    "config.json: schema_version: 3 is unknown": lambda f: edit(f / "config.json", schema_version=3),
    "config.json: schema_version: is missing": lambda f: edit(f / "config.json", schema_version=...),
    "config.json: options: is missing": lambda f: edit(f / "config.json", options=...),
    "config.json: extra: is an unknown field": lambda f: edit(f / "config.json", extra=1),
    "config.json: manager: unknown manager 'feature_score'": lambda f: edit(f / "config.json", manager="feature_score"),
    "config.json: options.windows: manager 'feature_scorer' has no such": lambda f: edit(
        f / "config.json", options={"windows": 1}
    ),
    "config.json: options.knots: ": lambda f: edit(f / "config.json", options={"knots": 0}),
    "config.json: options: .*budget": lambda f: edit(f / "config.json", options={"budget": -3}),
    "config.json: budget: 13 contradicts": lambda f: edit(f / "config.json", budget=13),
    "config.json: observes: .* contradicts": lambda f: edit(f / "config.json", observes=[]),
    "config.json: schedule: 5 is not a dict": lambda f: edit(f / "config.json", schedule=5),
    "config.json: is not JSON": lambda f: (f / "config.json").write_text('{"schema_version": 1'),
    "config.json: holds NaN": lambda f: (f / "config.json").write_text('{"schema_version": NaN}'),
    "config.json: an object is expected, this is list": lambda f: (f / "config.json").write_text("[]"),
    "config.json: is missing": lambda f: (f / "config.json").unlink(),
    "model.safetensors: is missing": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors: is damaged": lambda f: (f / "model.safetensors").write_bytes(b"\0" * 40),
    "model.safetensors: weights: is missing": lambda f: retensor(f, lambda t: t.pop("weights")),
    "model.safetensors: more: is not a tensor of": lambda f: retensor(f, lambda t: t.update(more=torch.zeros(1))),
    r"model.safetensors: weights: has shape \(3, 5\), \(3, 4\) is": lambda f: retensor(
        f, lambda t: t.update(weights=torch.zeros(3, 5))
    ),
    "model.safetensors: weights: has type torch.int32": lambda f: retensor(
        f, lambda t: t.update(weights=t["weights"].int())
    ),
    "model.safetensors: weights: 1 of 12 values are NaN": lambda f: retensor(f, poison(float("nan"))),
    "model.safetensors: weights: 1 of 12 values": lambda f: retensor(f, poison(float("-inf"))),
    "provenance.json: is missing": lambda f: (f / "provenance.json").unlink(),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named_by_file_and_field(message, folder):
    DAMAGE[message](folder)
    with pytest.raises(PluginError, match=message):
        plugins.read(folder)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins") / "plug"
    plugins.save(randomised(SPECS[1]), folder, {})
    plugins.save(randomised(SPECS[3]), folder, {"a": 1})
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=40)
@given(name=st.sampled_from(plugins.FILES[:3]), place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_random_damage_never_gets_through_as_another_error(contents, name, place, byte, cut):
    folder, whole = contents
    content = bytearray(whole[name])
    at = min(int(place * len(content)), len(content) - 1)
    content[at:] = b"" if cut else bytes([byte]) + content[at + 1 :]
    (folder / name).write_bytes(content)
    try:
        manager = plugins.read(folder).manager
    except PluginError as error:
        assert name in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert all(torch.isfinite(tensor).all() for tensor in manager.state_dict().values())
    finally:
        (folder / name).write_bytes(whole[name])


def test_values_that_are_not_finite_are_not_saved(tmp_path):
    manager = build("feature_scorer")
    with torch.no_grad():
        manager.weights[0, 0] = float("nan")
    with pytest.raises(PluginError, match="weights"):
        plugins.save(manager, tmp_path / "plug", {})
    assert not list(tmp_path.iterdir())


def test_another_class_refuses_and_missing_folders_are_said(folder, tmp_path):
    with pytest.raises(PluginError, match=r"manager: 'feature_scorer' is no KeyDiff"):
        KeyDiff.from_pretrained(folder)
    with pytest.raises(PluginError, match="no such folder"):
        plugins.load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(PluginError, match="is a file"):
        plugins.load(folder / "config.json")
    assert plugins.is_plugin(folder)
    assert not plugins.is_plugin(tmp_path)


def test_a_hub_name_without_network_says_so(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PluginError, match=r"'nobody/no-such-manager'.*hub"):
        plugins.load("nobody/no-such-manager")


def test_the_card_says_how_to_use_it_and_what_was_measured(tmp_path):
    row = {
        "model": "m", "task": "t", "manager": "mine", "budget": 64, "loglik": -1.25, "score": None,
        "bytes_mean": 2048.0, "difference": None, "interval": None, "role": "subject",
    }  # fmt: skip
    other = {**row, "manager": "keydiff", "role": "field", "difference": 0.5, "interval": [0.25, 0.75]}
    plugins.save(build("keydiff", budget=64), tmp_path / "p", {"comparison": [row, other], "sentences": ["It wins."]})
    card = (tmp_path / "p" / "README.md").read_text()
    assert "from_pretrained" in card
    assert "It wins." in card
    assert "| m | t | **mine** | 64 | -1.250 | - | 2 |  |" in card
    assert "| m | t | keydiff | 64 | -1.250 | - | 2 | 0.500 [0.250, 0.750] |" in card
    plugins.save(build("keydiff", budget=64), tmp_path / "p", {}, card="mine\n")
    assert (tmp_path / "p" / "README.md").read_text() == "mine\n"


GOLDEN = Path(__file__).parents[1] / "data" / "plugin_v1"


@pytest.mark.parametrize("name", ["feature_scorer", "namm"])
def test_plug_ins_of_the_first_version_decide_as_they_did(name):
    """Made when schema version 1 was new, with what they kept then: later versions of evomem are held to it."""
    told = safetensors.torch.load_file(GOLDEN / f"{name}.safetensors")
    found = plugins.read(GOLDEN / name)
    assert found.provenance["experiment"] == name
    recorded = {key.removeprefix("recorded."): t for key, t in told.items() if key.startswith("recorded.")}
    for layer in range(3):
        view = layer_view(
            told["keys"], told["values"], told["positions"], recorded=recorded, observes=found.manager.observes,
            layer=layer, layers=3,
        )  # fmt: skip
        assert torch.equal(found.manager.decide(view).keep, told[f"keep.{layer}"])
        score = found.manager.score(view)[view.valid]
        assert torch.allclose(score, told[f"score.{layer}"][view.valid], rtol=1e-4, atol=1e-5)
    plain = json.loads((GOLDEN / name / "config.json").read_text())
    assert plain["schema_version"] == 1


def test_a_manager_keeps_where_it_comes_from(tmp_path):
    told = {"experiment": "mine", "comparison": [{"manager": "mine", "role": "subject", "loglik": -1.25}], "seed": 3}
    png = b"\x89PNG\r\n\x1a\n" + bytes(50)
    plugins.save(randomised(SPECS[3]), tmp_path / "a", told, pictures={"fitness.png": png, "comparison.png": png})
    first = MemoryManager.from_pretrained(tmp_path / "a", budget=5)
    first.save_pretrained(tmp_path / "b")
    again = plugins.read(tmp_path / "b")
    assert again.manager.options.budget == 5
    assert again.provenance == told
    assert again.pictures == {"fitness.png": png, "comparison.png": png}
    card = (tmp_path / "b" / "README.md").read_text()
    assert "**mine**" in card
    assert "](assets/comparison.png)" in card
    assert "](assets/fitness.png)" in card
    plugins.save(again.manager, tmp_path / "c", {}, pictures={})  # what is given comes first
    assert plugins.read(tmp_path / "c").provenance == {}
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted(plugins.FILES)
    # Pictures are not needed, and a plug-in without a provenance still manages.
    (tmp_path / "b" / "assets" / "fitness.png").write_bytes(b"GIF")
    (tmp_path / "b" / "provenance.json").unlink()
    bare = plugins.load(tmp_path / "b")
    assert bare.provenance == {}
    assert list(bare.pictures) == ["comparison.png"]


def test_the_head_of_a_card_names_base_models_that_are_repositories(tmp_path):
    digests = [{"name": name, "model_digest": "0"} for name in ("owner/name", "smollm2-135m", "/a/b", "owner/true")]
    plugins.save(build("keydiff"), tmp_path / "p", {"model": {"name": "owner/name"}, "model_digests": digests})
    card = (tmp_path / "p" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["owner/name", "owner/true"]
    assert all(f"| found on | {one['name']} " in card for one in digests)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": {"../x.png": b"\x89PNG\r\n\x1a\n"}}, "is no PNG"),
        ({"pictures": {"x.png": b"GIF89"}}, "is no PNG"),
        ({"provenance": {"long": "x" * (4 << 20)}}, "provenance.json: would have"),
        ({"card": "x" * (2 << 20)}, "README.md: would have"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(changes, message, tmp_path):
    with pytest.raises(PluginError, match=message):
        plugins.save(build("keydiff"), tmp_path / "plug", **changes)
    assert not list(tmp_path.iterdir())


def test_a_constructor_that_needs_real_tensors_is_told_when_it_saves(tmp_path):
    class Counting(KeyDiff):
        name = "counting"

        def __init__(self, **options):
            super().__init__(**options)
            self.scale = float(torch.ones(3).sum())  # an item: on the meta device there is none

    managers.register("counting")(Counting)
    try:
        with pytest.raises(PluginError, match=r"'counting' cannot be built.*torch\.device\('meta'\)"):
            plugins.save(Counting(), tmp_path / "plug", {})
    finally:
        del managers._classes["counting"]


def test_the_mixin_is_there_and_its_shortcuts_are_not(folder, tmp_path):
    manager = MemoryManager.from_pretrained(folder)
    assert isinstance(manager, PyTorchModelHubMixin)
    with pytest.raises(ConfigError, match="config"):
        manager.save_pretrained(tmp_path / "x", config={"budget": 3})
    with pytest.raises(ConfigError, match="budgets"):
        MemoryManager.from_pretrained(folder, budgets=3)


def test_views_of_another_engine_are_checked(tmp_path):
    keys, values = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 3)
    view = layer_view(keys, values)
    assert view.slots.shape == (2, 2, 6)
    assert view.slots[1, 1].tolist() == list(range(6))
    assert (view.seen, view.fresh, view.start.tolist()) == (6, 6, [0, 0])
    rows = torch.tensor([[-1, 0, 3, 4, 5, 9], [0, 1, 2, 3, 4, 5]])
    assert layer_view(keys, values, rows).slots[:, 1].tolist() == rows.tolist()
    assert layer_view(keys, values, rows).seen == 10
    for message, arguments in {
        "give \\(batch, kv_heads, slots, head_dim\\) each": (keys, values[:, :1]),
        "positions have shape \\(5,\\)": (keys, values, torch.arange(5)),
        "must ascend": (keys, values, torch.tensor([0, 1, 1, 2, 3, 4])),
        "-1 marks empty slots": (keys, values, torch.tensor([0, 1, -1, 2, 3, 4])),
        "give token indices": (keys, values, torch.rand(6)),
    }.items():
        with pytest.raises(CacheError, match=message):
            layer_view(*arguments)
    for message, options in {
        "no 'attention_sum'": {"observes": {"attention_sum"}},
        "no 'query_mean'": {"observes": build("expected_attention").observes},
        "first axes are \\(2, 2, 6\\)": {"recorded": {"attention_sum": torch.ones(2, 2, 5)}},
        "only 3 tokens were seen": {"seen": 3},
        "layer 4 of 4": {"layer": 4, "layers": 4},
        "give one index a row": {"start": torch.zeros(3, dtype=torch.int64)},
    }.items():
        with pytest.raises(CacheError, match=message):
            layer_view(keys, values, **options)


def test_new_plug_ins_are_of_schema_2_and_say_how_their_budget_is_shared(tmp_path):
    plugins.save(build("adakv(pyramidkv(beta=5))", budget=7), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["schema_version"] == 2
    assert (config["allocation"]["name"], config["allocation"]["options"]["layers"]["name"]) == (
        "across_heads",
        "pyramid",
    )
    assert plugins.load(tmp_path / "a").describe() == build("adakv(pyramidkv(beta=5))", budget=7).describe()
    for changes in ({"allocation": {"name": "uniform", "options": {}}}, {"schema_version": 1}, {"allocation": ...}):
        plugins.save(build("adakv(pyramidkv(beta=5))", budget=7), tmp_path / "b")
        edit(tmp_path / "b" / "config.json", **changes)
        with pytest.raises(PluginError, match=r"config\.json: .?allocation"):
            plugins.load(tmp_path / "b")
