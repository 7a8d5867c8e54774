"""Damaged weights load as a model without NaN or infinity, or are refused in one sentence."""

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from fuzz_budget import BUDGET
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from toy import toy_recipe

from calm.data.stories import write_stories
from calm.errors import InputError
from calm.models.loading import load_autoencoder, load_model
from calm.models.published import load_published
from calm.training import stages
from calm.training.recipe_files import with_settings

FIXTURES = Path(__file__).parents[1] / "fixtures"
NUMBERS = st.sampled_from([0, 1, -1, 2, 5, 64, 255, 2**31, 2**53, 2**63, 10**20, 0.5, 1e308])
DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "C64", "I64", "BOOL", "U8", "F4", "", "x"])
SPECIAL = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38, 0.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_stories(folder / "text.jsonl", 0, 12)
    toy = with_settings(toy_recipe(folder / "text.jsonl"), {"language_model.training.steps": 1})
    stages.train(toy, folder / "run")
    for part in ("model", "autoencoder"):
        (folder / "run" / part / "checksums.json").unlink()
    return folder / "run"


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A file with a few pieces overwritten, cut out or inserted."""
    for _ in range(draw(st.integers(1, 3))):
        # Most of a file is tensor data; most of what can go wrong is at its beginning and its end.
        span = draw(st.sampled_from([64, 4096, len(content)]))
        distance = draw(st.integers(0, min(span, len(content))))
        start = draw(st.sampled_from([distance, len(content) - distance]))
        stop = start + draw(st.sampled_from([0, 1, 1, 4, 100, 10**9]))
        content = content[:start] + draw(st.binary(max_size=8)) + content[stop:]
    return content


@st.composite
def with_false_header(draw, content: bytes) -> bytes:
    """A safetensors file whose header does not match its data."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(header)))
        kind = draw(st.sampled_from(["shape", "dtype", "offsets", "name", "drop", "more"]))
        if kind == "drop" or not isinstance(header[name], dict) or "shape" not in header[name]:
            del header[name]
        elif kind == "shape":
            header[name]["shape"] = draw(st.lists(NUMBERS, max_size=3) | st.just(header[name]["shape"][::-1]))
        elif kind == "dtype":
            header[name]["dtype"] = draw(DTYPES)
        elif kind == "offsets":
            header[name]["data_offsets"] = draw(st.lists(NUMBERS, max_size=3))
        elif kind == "name":
            header[draw(st.sampled_from(["", "../x", "\0", "head.new", *header]))] = header.pop(name)
        else:
            header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        if not header:
            break
    text = json.dumps(header).encode()
    length_field = draw(st.sampled_from([len(text)] * 6 + [0, 1, len(text) - 1, 2**40, 2**63]))
    return struct.pack("<Q", length_field) + text + data


@st.composite
def with_odd_tensors(draw, content: bytes) -> bytes:
    """A file with tensors of other types or shapes, missing tensors, or values that are not finite."""
    weights = load(content)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(weights)))
        change = draw(st.sampled_from(["type", "value", "shape", "drop"]))
        if change == "type":
            kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
            weights[name] = weights[name].to(draw(st.sampled_from(kinds)))
        elif change == "value" and weights[name].is_floating_point() and weights[name].numel():
            weights[name] = weights[name].clone()
            weights[name].view(-1)[draw(st.integers(0, weights[name].numel() - 1))] = draw(SPECIAL)
        elif change == "shape":
            weight = weights[name]
            weights[name] = draw(st.sampled_from([weight.flatten(), weight[:0], weight[None]]))
        elif len(weights) > 1:
            del weights[name]
    return save({name: weight.contiguous() for name, weight in weights.items()}, {"format": "pt"})


def check_refused_or_finite(load_weights):
    """Load a model; what is refused must be one short sentence."""
    try:
        model = load_weights()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000, str(error)
        assert "weights_only" not in str(error)
        return
    for name, weight in model.state_dict().items():
        assert not weight.is_floating_point() or weight.isfinite().all(), name


@pytest.mark.parametrize("change", [damaged, with_false_header, with_odd_tensors])
@pytest.mark.parametrize("part", ["model", "autoencoder"])
@BUDGET
@given(data=st.data())
def test_damaged_safetensors(part, change, data, folder):
    path = folder / part / "model.safetensors"
    good = path.read_bytes()
    try:
        path.write_bytes(data.draw(change(good)))
        open_model = {"model": load_model, "autoencoder": load_autoencoder}[part]
        check_refused_or_finite(lambda: open_model(str(path.parent)))
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("form", ["torch", "legacy"])
@BUDGET
@given(data=st.data())
def test_damaged_pickles(form, data, folder):
    path = folder / "autoencoder/pytorch_model.bin"
    safe = path.with_name("model.safetensors")
    good, buffer = safe.read_bytes(), io.BytesIO()
    torch.save(load_file(safe), buffer, _use_new_zipfile_serialization=form == "torch")
    try:
        safe.unlink()
        path.write_bytes(data.draw(damaged(buffer.getvalue())))
        check_refused_or_finite(lambda: load_autoencoder(path.parent))
    finally:
        path.unlink(missing_ok=True)
        safe.write_bytes(good)


NAMES = st.sampled_from(["model-1.safetensors", "../x", "/etc/passwd", "", ".", "\0", "none"])
INDICES = st.recursive(
    st.none() | NUMBERS | NAMES,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["weight_map", "metadata", "a", "head.out.weight"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@BUDGET
@given(index=INDICES | st.dictionaries(st.just("weight_map"), INDICES, min_size=1))
def test_arbitrary_indices_of_shards(index, folder):
    single_file = folder / "model/model.safetensors"
    index_file = single_file.with_name("model.safetensors.index.json")
    shard = single_file.with_name("model-1.safetensors")
    single_file.rename(shard)
    try:
        index_file.write_text(json.dumps(index))
        check_refused_or_finite(lambda: load_model(str(index_file.parent)))
    finally:
        index_file.unlink()
        shard.rename(single_file)


@pytest.mark.parametrize("kind", ["energy_k4", "flow_k4"])
@pytest.mark.parametrize("part", ["autoencoder", "calm"])
@BUDGET
@given(data=st.data())
def test_damaged_released_checkpoints(part, kind, data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "released" / kind
    for name in ("autoencoder", "calm"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in (FIXTURES / kind / name).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (path,) = [file for file in (folder / part).iterdir() if file.suffix in (".bin", ".safetensors")]
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    check_refused_or_finite(lambda: load_published(folder / "autoencoder", folder / "calm"))
