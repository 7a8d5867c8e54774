"""Changed configurations load as a model that can generate, or are refused in one sentence."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzz_budget import BUDGET
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_recipe

from calm.data.stories import write_stories
from calm.data.tokenizer import load_tokenizer
from calm.errors import InputError
from calm.models.loading import load_autoencoder, load_language_model_and_tokenizer
from calm.models.published import load_published
from calm.texts import continue_texts
from calm.training import stages
from calm.training.recipe_files import with_settings

FIXTURES = Path(__file__).parents[1] / "fixtures"
INTEGERS = [0, 1, -1, 2, 3, 7, 64, 255, 2**31, 2**63, 10**12, 10**30]
NUMBERS = st.sampled_from([*INTEGERS, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf")])
TEXTS = st.sampled_from(
    ["", "calm", "llama", "../..", "\0", "evil/kernels", "flash_attention_2", "x" * 1000, "float32"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=5,
)


def paths_in(values, before=()):
    """Paths of keys and indices to a JSON value and everything in it."""
    yield before
    inner = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    )
    for key, value in inner:
        yield from paths_in(value, (*before, key))


@st.composite
def mutated(draw, values):
    """Settings with up to three of them changed, removed or added."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([path for path in paths_in(values) if path]))
        inner = values
        for key in parents:
            inner = inner[key]
        if isinstance(inner, dict) and draw(st.integers(0, 5)) == 0:
            del inner[last]
        elif isinstance(inner, dict) and draw(st.integers(0, 5)) == 0:
            inner[draw(TEXTS)] = draw(VALUES)
        else:
            inner[last] = draw(VALUES)
        if not isinstance(values, dict) or not values:
            break
    return values


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of several kinds, without the checksums that would reveal a change."""
    folder = tmp_path_factory.mktemp("models")
    write_stories(folder / "text.jsonl", 0, 12)
    toy = with_settings(toy_recipe(folder / "text.jsonl"), {"language_model.training.steps": 1})
    stages.train(toy, folder / "energy")
    text = {"data.sources": str(folder / "energy/data")}
    codes = {"autoencoder.kind": "codes", "autoencoder.latent_size": 32}
    head = {"language_model.head": {"head_type": "sequential", "rank": 8, "token_size": 4, "num_blocks": 1}}
    stages.train(with_settings(toy, text | codes | head), folder / "sequential")
    tokens = {"model": "autoregressive", "chunk_size": 1}
    stages.train(with_settings(toy, text | tokens), folder / "tokens")
    for file in folder.rglob("checksums.json"):
        if file.parent.name != "data":
            file.unlink()
    return folder


@contextlib.contextmanager
def mutated_file(path, data):
    """Change something in a JSON file for the block."""
    good = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(mutated(json.loads(good)))))
        yield
    finally:
        path.write_text(good)


def check_refused_or_works(work):
    """Do some work; if it is refused, then in one short sentence."""
    try:
        with torch.no_grad():
            work()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, str(error)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["energy", "sequential", "tokens"])
@BUDGET
@given(data=st.data())
def test_mutated_configurations_of_models(kind, file, data, folders):
    path = folders / kind / "model" / file

    def write():
        model, tokenizer = load_language_model_and_tokenizer(str(path.parent))
        text = continue_texts(model, tokenizer, ["One day"], max_new_tokens=8, seed=1)
        assert isinstance(text[0], str)

    with mutated_file(path, data):
        check_refused_or_works(write)


@BUDGET
@given(data=st.data())
def test_mutated_configuration_of_an_autoencoder(data, folders):
    path = folders / "energy/autoencoder/config.json"
    with mutated_file(path, data):
        check_refused_or_works(lambda: load_autoencoder(path.parent))


@BUDGET
@given(data=st.data())
def test_mutated_tokenizer(data, folders):
    path = folders / "energy/data/tokenizer/tokenizer.json"
    with mutated_file(path, data):
        check_refused_or_works(lambda: load_tokenizer(str(path.parent)))


@pytest.mark.parametrize("part", ["autoencoder", "calm"])
@BUDGET
@given(data=st.data())
def test_mutated_configurations_of_released_checkpoints(part, data, folders):
    folder = folders / "released"
    if not folder.exists():
        shutil.copytree(FIXTURES / "energy_k4", folder)
    path = folder / part / "config.json"
    with mutated_file(path, data):
        check_refused_or_works(lambda: load_published(folder / "autoencoder", folder / "calm"))
