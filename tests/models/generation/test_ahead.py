"""Steps compiled ahead of time write the same text, and are used only for the model they belong to."""

from dataclasses import replace

import peft
import pytest
import torch
from tiny import HEADS, tiny_model
from transformers import AutoTokenizer

from calm.core.random import numbers_for
from calm.core.samplers import HeadSampler
from calm.models.generation import ahead, tracing
from calm.models.generation.ahead import compile_steps, find_steps
from calm.models.generation.batching import ChunkBatch
from calm.models.generation.sampler_registry import sampler_from
from calm.models.loading import load_language_model_and_tokenizer
from calm.models.shipped import folder_of

pytestmark = pytest.mark.timeout(900)  # Compilation is slow.


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A model with everything compiled, and the folder of the compiled files."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny_model(backbone_config={"max_position_embeddings": 256, "num_hidden_layers": 1})
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALM_CACHE", str(folder))
        compile_steps(model)
    return model, folder


@pytest.fixture
def steps(compiled, monkeypatch):
    model, folder = compiled
    monkeypatch.setenv("CALM_CACHE", str(folder))
    return find_steps(model)


def count_calls(steps, monkeypatch):
    """Count the calls of each compiled function from now on."""
    calls = dict.fromkeys(steps.functions, 0)

    def counted(name, function):
        def call(*tensors):
            calls[name] += 1
            return function(*tensors)

        return call

    wrapped = {name: counted(name, function) for name, function in steps.functions.items()}
    monkeypatch.setattr(steps, "functions", wrapped)
    return calls


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("lengths", [(6,), (9, 2, 6)])
def test_compiled_steps_write_the_same_text(lengths, temperature, compiled, steps, monkeypatch):
    model, _ = compiled
    calls = count_calls(steps, monkeypatch)
    prompt = torch.randint(3, 40, (len(lengths), max(lengths)))
    mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths]).long()
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 150,  # The cache has to grow, and its window with it.
        "temperature": temperature,
        "max_draws": 30,
        "eos_token_id": [] if temperature == 1 else [7],  # Some rows end before the others.
        "seed": 3,
    }
    with_steps = model.generate(prompt, **settings)
    calls_with_steps = dict(calls)
    assert (with_steps == model.generate(prompt, disable_compile=True, **settings)).all()
    assert calls == calls_with_steps
    rows = "many" if len(lengths) > 1 else "one"
    assert calls_with_steps[f"advance-{rows}"]
    assert calls_with_steps["draw-many-1"] or calls_with_steps["draw-one-1"]


def test_rows_that_join_and_leave_write_the_same_text(compiled, steps, monkeypatch):
    model, _ = compiled
    monkeypatch.setattr(model.config, "eos_token_id", None)
    calls = count_calls(steps, monkeypatch)
    batch, texts, sampler = ChunkBatch(model), {}, sampler_from()
    prompts = [[5, 6, 7], [9] * 30, [12, 13], [14] * 5]
    for number, prompt in enumerate(prompts):
        texts[batch.join(prompt, sampler, 12 + 8 * number, number)] = []
        for written in batch.step():
            texts[written.row] += written.tokens
    while len(batch):
        for written in batch.step():
            texts[written.row] += written.tokens
    assert all(calls.values())
    for number, (prompt, text) in enumerate(zip(prompts, texts.values(), strict=True)):
        settings = {"max_new_tokens": 12 + 8 * number, "seed": number, "temperature": 1.0, "eos_token_id": []}
        alone = model.generate(torch.tensor([prompt]), disable_compile=True, **settings)
        assert text == alone[0, len(prompt) :].tolist()


def test_steps_are_found_only_for_the_same_layers_and_threads(compiled, steps, monkeypatch):
    model, _ = compiled
    weight = model.backbone.norm.weight
    with torch.no_grad():
        weight.add_(0.5)
        assert find_steps(model) is None
        weight.sub_(0.5)
    assert find_steps(model) is not None
    monkeypatch.setattr(model.config, "eos_token_id", None)  # No layer depends on it.
    object.__delattr__(model, "_compiled_steps")
    assert find_steps(model) is not None
    assert find_steps(tiny_model()) is None
    torch.set_num_threads(2)  # Loops are compiled for a number of threads.
    assert find_steps(model) is None


@pytest.fixture
def store_fake_step(monkeypatch, tmp_path):
    """A function that stores a fake step of a model; the step loads as its folder, which is returned."""
    monkeypatch.setenv("CALM_CACHE", str(tmp_path))
    monkeypatch.setattr(ahead, "load_function", lambda file: file.parent)

    def store(model):
        folder = ahead.folder_of_steps(model)
        folder.mkdir(parents=True)
        (folder / "advance-one.pt2").touch()
        return folder

    return store


def test_each_sampling_setting_of_the_head_has_its_own_steps(store_fake_step):
    model, folders = tiny_model(head_config={"head_type": "flow"}), {}
    for num_steps in (3, 4):
        model.change_sampling(num_steps=num_steps)
        folders[num_steps] = store_fake_step(model)
    for num_steps in (3, 4, 3):
        model.change_sampling(num_steps=num_steps)
        assert find_steps(model).functions == {"advance-one": folders[num_steps]}


def test_weight_changes_that_torch_does_not_count_are_noticed(store_fake_step):
    model = tiny_model()
    store_fake_step(model)
    assert find_steps(model) is not None
    weight = model.backbone.layers[0].self_attn.q_proj.weight
    version = weight._version
    weight.data += 1e-3  # As peft merges adapters.
    assert weight._version == version and find_steps(model) is None


def test_adapted_model_does_not_use_the_steps_of_its_base(store_fake_step, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder_of("stories"))
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, _ = load_language_model_and_tokenizer(str(tmp_path / "base"))
    store_fake_step(base)
    assert find_steps(base) is not None
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(base, adapters).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted, _ = load_language_model_and_tokenizer(str(tmp_path / "adapter"))
    assert find_steps(adapted) is None


def test_weight_changes_in_inference_mode_are_noticed(store_fake_step):
    with torch.inference_mode():
        model = tiny_model()
        store_fake_step(model)
        assert find_steps(model) is not None
        model.backbone.norm.weight.add_(0.5)
        assert find_steps(model) is None


def test_draws_that_are_not_finite_are_refused(compiled, steps):
    model, _ = compiled
    prepared = torch.full_like(model.head.prepare(torch.zeros(1, 32)), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        steps.draw(prepared, 1, None, 1.0)


def test_draws_in_parts_match_those_made_at_once(compiled, steps, monkeypatch):
    prepared = compiled[0].head.prepare(torch.randn(3, 32)).detach()
    expected = steps.draw(prepared, 5, torch.Generator().manual_seed(1), 1.0)
    monkeypatch.setattr(steps, "_draws_at_once", 7)  # 7, 7 and a single one.
    assert (steps.draw(prepared, 5, torch.Generator().manual_seed(1), 1.0) == expected).all()


def test_compiled_steps_are_not_used_under_autocast(compiled, steps, monkeypatch):
    calls = count_calls(steps, monkeypatch)
    prompt = torch.randint(3, 40, (1, 6))
    with torch.autocast("cpu", torch.bfloat16):
        compiled[0].generate(prompt, max_new_tokens=12, temperature=1.0, eos_token_id=[])
    assert not any(calls.values())


def test_no_draw_at_a_temperature_that_is_not_compiled(compiled, steps):
    assert steps.draw(compiled[0].head.prepare(torch.zeros(1, 32)), 1, None, 0.5) is None


def test_nothing_is_compiled_twice(compiled, steps):
    announced = []
    compile_steps(compiled[0], announce=announced.append)
    assert announced == []


def test_failed_compilation_leaves_no_file(compiled, steps, monkeypatch):
    model, folder = compiled
    file = next(folder.rglob("draw-one-1.pt2"))
    contents = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(tracing, "_check_same", lambda *_: (_ for _ in ()).throw(ValueError("not the same")))
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", lambda *_, package_path, **__: None)
    monkeypatch.setattr(tracing, "load_function", lambda _: None)
    with pytest.raises(ValueError, match="not the same"):
        compile_steps(model)
    assert not list(folder.rglob("draw-one*"))
    file.write_bytes(contents)


def arguments_of(model, name, rows):
    """Arguments of a function to trace, for this many rows."""
    if name.startswith("draw"):
        prepared = model.head.prepare(torch.randn(rows, model.config.state_size))
        requests = ahead.requests_of_draw(model, prepared[:1], 1.0)
        return prepared, *numbers_for(requests, 1, rows, None)
    cache = [torch.randn(rows, 2, 48, 8) for _ in range(4)]
    return torch.randint(3, 40, (rows, 4)), torch.arange(rows), *cache


def test_files_that_cannot_be_loaded_are_removed(compiled, steps, caplog):
    model, folder = compiled
    file = next(folder.rglob("advance-one.pt2"))
    contents = file.read_bytes()
    file.write_bytes(contents[:1000])
    object.__delattr__(model, "_compiled_steps")
    try:
        assert "advance-one" not in find_steps(model).functions
        assert "could not be loaded and was removed" in caplog.text and not file.exists()
    finally:
        file.write_bytes(contents)
        object.__delattr__(model, "_compiled_steps")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("head_type", HEADS)
@torch.no_grad()
def test_traced_functions_match_the_model(head_type, rows):
    model = tiny_model(head_config={"head_type": head_type})
    for name, build in ahead.functions_to_trace(model, [rows], [1.0]):
        traced = build()
        program = torch.export.export(traced.module, traced.arguments, dynamic_shapes=traced.dynamic)
        tracing._refuse_randomness(program)
        tracing._check_same(traced, program.module())
        if rows > 1:  # The same program takes other numbers of rows.
            more = replace(traced, arguments=arguments_of(model, name, 5))
            tracing._check_same(more, program.module())


@torch.no_grad()
def test_linear_layers_are_traced_as_products_of_matrices():
    """torch also traces products of tensors with more axes, but cannot compile all of them."""
    model = tiny_model(head_config={"head_type": "decoder"}, backbone_config={"use_qk_norm": True})
    for _, build in ahead.functions_to_trace(model, [1], [1.0]):
        traced = build()
        program = torch.export.export(traced.module, traced.arguments, dynamic_shapes=traced.dynamic)
        products = [node for node in program.graph.nodes if node.target == torch.ops.aten.linear.default]
        assert len(products) > 7 and {node.args[0].meta["val"].ndim for node in products} == {2}


def test_traced_draw_at_a_low_temperature_matches_the_head():
    model = tiny_model(head_config={"head_type": "sequential"})
    state = torch.randn(2, model.config.state_size)
    prepared = model.head.prepare(state).detach()
    generator = torch.Generator().manual_seed(2)
    expected = model.head.draw_chunks(prepared, 1, generator, 0.3)
    [(name, build)] = list(ahead.functions_to_trace(model, [2], [0.3]))[1:]
    assert name == "draw-many-0.3"
    steps = ahead.CompiledSteps(model, {name: build().module})
    assert (steps.draw(prepared, 1, torch.Generator().manual_seed(2), 0.3) == expected).all()
    sampler = HeadSampler(temperature=0.3)
    sample = model.sample_chunks(state, sampler, torch.Generator().manual_seed(2), steps)
    assert (sample.chunks_RK == expected[0]).all()


def test_heads_with_their_own_random_numbers_are_refused():
    model = tiny_model()
    real = model.head.draw_latents
    model.head.draw_latents = lambda prepared, *args, **kwargs: (
        real(prepared, *args, **kwargs) + torch.rand(1)
    )
    [(_, build)] = list(ahead.functions_to_trace(model, [1], [1.0]))[1:]
    traced = build()
    with pytest.raises(ValueError, match="its own random numbers"), torch.no_grad():
        tracing._refuse_randomness(torch.export.export(traced.module, traced.arguments))


@pytest.mark.parametrize("branch", [len, lambda prepared: bool(prepared.sum() > 0)], ids=["len", "value"])
def test_heads_that_cannot_be_traced_are_refused(branch, monkeypatch, tmp_path):
    monkeypatch.setenv("CALM_CACHE", str(tmp_path))
    model = tiny_model()
    real = model.head.draw_latents
    model.head.draw_latents = lambda prepared, *args, **kwargs: (
        real(prepared, *args, **kwargs) + branch(prepared)
    )
    [_, (name, build)] = ahead.functions_to_trace(model, [2], [1.0])
    with pytest.raises(ValueError, match=r"cannot be traced .*; a custom head must"), torch.no_grad():
        tracing.compile_function(build(), tmp_path / f"{name}.pt2")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_compiled_are_refused(monkeypatch):
    hooked = tiny_model()
    hooked.backbone.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="have hooks"):
        compile_steps(hooked)
    with pytest.raises(ValueError, match="this model is on meta"):
        compile_steps(tiny_model().to("meta"))


def test_every_change_of_weights_changes_the_digest():
    # The digest sums complete rows of 8-byte words, and hashes what is left: these embeddings have both.
    model = tiny_model(vocab_size=3000)
    digests = {ahead.digest_of_weights(model)}
    table = model.backbone.embed_tokens.weight.data
    for change in (
        lambda: table.copy_(table.flip(0)),
        lambda: table[:2].copy_(table[:2].flip(1)),
        lambda: table[0, 0].add_(1e-6),
        lambda: model.backbone.norm.weight.data.fill_(2.0),
        lambda: model.backbone.norm.weight.data.fill_(0.0),
    ):
        change()
        digests.add(ahead.digest_of_weights(model))
    assert len(digests) == 6
