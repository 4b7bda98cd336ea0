"""Recipes with anything anywhere: read, or refused in words that name a key."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.pretraining.recipe import read_recipe
from deepspeed_sdp.subnetwork import meta_model, read_model_config
from tests.data.test_manifest import ANY, assert_one_line, paths_of
from tests.support.ranks import ROOT

RECIPE = ROOT / "ds_configs" / "recipes" / "15m.json"
MODEL = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def altered(data, whole):
    value = deepcopy(whole)
    path = data.draw(st.sampled_from([path for path in paths_of(value) if path]))
    place = value
    for key in path[:-1]:
        place = place[key]
    if data.draw(st.booleans()):
        place[path[-1]] = data.draw(ANY | st.just(10**400))
    else:
        del place[path[-1]]
    return value


def assert_short(error):
    """A line for each key that is wrong."""
    assert len(str(error)) < 2000


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_recipe_with_anything_anywhere_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("recipe") / "recipe.json"
    file.write_text(json.dumps(altered(data, json.loads(RECIPE.read_text()))))
    try:
        recipe = read_recipe(file)
        recipe.for_steps(10)
        recipe.micro_batches(1)
    except ConfigError as error:
        assert_short(error)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_model_with_anything_anywhere_is_built_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("model") / "config.json"
    config = altered(data, MODEL)
    # Without memory, however large; what is bounded is the number of modules.
    file.write_text(json.dumps({**config, "num_hidden_layers": config.get("num_hidden_layers", 1)}))
    try:
        meta_model(read_model_config(file))
    except ConfigError as error:
        assert_one_line(error)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("length.tokens", "1e300", "length.tokens: got 1e"),
        ("length.tokens", f"{10**39}", "length.tokens: got 1"),
        ("length.tokens", "9" * 5000, "length.tokens: got "),
        ("length.tokens", "[" * 100_000, "length.tokens: got "),
        ("data.seq_length", "99999999999", "data.seq_length: got 99999999999"),
        (
            "deepspeed.train_batch_size",
            "9999999999999",
            "train_batch_size: got 9999999999999; takes a whole number from 1 on, up to",
        ),
        ("logging.log_interval", "NaN", 'logging.log_interval: got "NaN"'),
    ],
)
def test_what_is_out_of_bounds_is_refused(key, value, message):
    with pytest.raises(ConfigError) as error:
        read_recipe(RECIPE, [(key, value)])
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def test_a_model_of_a_million_layers_is_not_built(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "num_hidden_layers": 10**6}))
    with pytest.raises(ConfigError, match="num_hidden_layers: got 1000000; takes up to 10000"):
        read_model_config(tmp_path)
