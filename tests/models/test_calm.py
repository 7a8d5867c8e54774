"""The language model: frozen autoencoder, targets, documents, causality, round trips, Auto classes."""

import subprocess
import sys
import warnings

import pytest
import torch
from tiny import HEADS, tiny_config, tiny_llama, tiny_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import calm
from calm.models.calm import CalmForCausalLM
from calm.models.heads import EnergyHead, Target


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 8])
def test_trains_at_any_chunk_size(chunk_size):
    model = tiny_model(chunk_size).train()
    ids = torch.randint(3, 40, (2, 4 * chunk_size))
    model(ids, labels=ids).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


@pytest.mark.parametrize("backbone_input", ["latents", "both"])
def test_backbone_can_read_latents(backbone_input):
    """It reads each chunk's posterior mean, alone or beside the tokens."""
    model = tiny_model(backbone_input=backbone_input)
    ids = torch.randint(3, 40, (2, 16))
    latents = model.autoencoder.encode(ids.unflatten(-1, (-1, 4))).mean
    tokens = model.backbone.embed_tokens(ids).reshape(2, 4, -1)
    read = torch.cat([tokens, latents], -1) if backbone_input == "both" else latents
    expected = model.backbone(inputs_embeds=model.projection(read)).last_hidden_state
    assert_close(model.hidden_states_of_chunks(ids), expected)
    # Chunks are encoded once, for input and target; the loss is that of targets encoded on their own.
    noise = model.draw_training_noise([torch.Generator().manual_seed(n) for n in (0, 1)], ids, ids)
    chunks = ids.unflatten(-1, (-1, 4))[:, 1:].flatten(0, 1)
    target = Target(model.autoencoder.encode(chunks), chunks)
    loss = model.head.loss(expected[:, :-1].flatten(0, 1), target, noise)
    assert_close(model(ids, labels=ids, noise=noise).loss, loss.mean())


@pytest.mark.parametrize("backbone_input", ["latents", "both"])
def test_backbone_that_reads_latents_trains_and_generates(backbone_input, tmp_path):
    model = tiny_model(backbone_input=backbone_input)
    ids = torch.randint(3, 40, (2, 16))
    model.train()
    model(ids, labels=ids).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [name for name, p in model.autoencoder.named_parameters() if p.grad is not None]
    model.eval().save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 9, "temperature": 1.0, "seed": 1}
    text = model.generate(ids, **settings)
    assert (loaded.generate(ids, **settings) == text).all()
    assert (model.generate(ids, use_cache=False, **settings) == text).all()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_is_accepted_by_both_of_its_names(model, name):
    """transformers calls it `cache` from version 5.24 on."""
    ids = torch.randint(3, 40, (2, 16))
    first = model(ids[:, :8], use_cache=True)
    assert first.cache is first.past_key_values and first.cache.get_seq_length() == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # The backbone must get it by its current name.
        second = model(ids[:, 8:], use_cache=True, **{name: first.cache})
    assert second.cache is first.cache and second.cache.get_seq_length() == 4
    assert_close(second.last_hidden_state, model(ids).last_hidden_state[:, 2:])
    # A given cache is used even if none would be created.
    first = model(ids[:, :8], use_cache=True)
    assert_close(model(ids[:, 8:], **{name: first.cache}).last_hidden_state, second.last_hidden_state)


def test_unknown_backbone_input_is_refused():
    with pytest.raises(ValueError, match="must be one of tokens, latents, both, got 'words'"):
        tiny_config(backbone_input="words")


def test_autoencoder_stays_frozen_and_in_eval_mode(model, tmp_path):
    model.save_pretrained(tmp_path)
    for candidate in (model, CalmForCausalLM.from_pretrained(tmp_path)):
        before = {name: p.clone() for name, p in candidate.autoencoder.named_parameters()}
        candidate.train()
        assert not candidate.autoencoder.training
        assert all(not module.training for module in candidate.autoencoder.modules())
        ids = torch.randint(3, 40, (2, 16))
        optimizer = torch.optim.SGD(candidate.parameters(), lr=1.0)
        candidate(ids, labels=ids).loss.backward()
        optimizer.step()
        assert all(not p.requires_grad for p in candidate.autoencoder.parameters())
        assert all((p == before[name]).all() for name, p in candidate.autoencoder.named_parameters())


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CalmForCausalLM
    ids = torch.randint(3, 40, (2, 16))
    assert (loaded.hidden_states_of_chunks(ids) == model.hidden_states_of_chunks(ids)).all()
    losses = [m(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss for m in (loaded, model)]
    assert losses[0] == losses[1]
    assert all(
        (a == b).all() for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_import_calm_is_enough_for_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    code = (
        "import calm; from transformers import AutoConfig, AutoModelForCausalLM as A; "
        f"print(type(A.from_pretrained({str(tmp_path)!r})).__name__, AutoConfig.for_model('calm').model_type)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["CalmForCausalLM", "calm"]
    import_last = code.replace("import calm; ", "").replace("; print", "; import calm; print")
    out = subprocess.run(
        [sys.executable, "-c", import_last], capture_output=True, text=True, check=True
    ).stdout
    assert out.split() == ["CalmForCausalLM", "calm"]
    assert AutoConfig.for_model("calm").model_type == "calm"


def test_public_names():
    for name in calm.__all__:
        assert getattr(calm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = calm.nothing


def test_later_chunks_do_not_change_earlier_states(model):
    ids = torch.randint(3, 40, (1, 24))
    changed = ids.clone()
    changed[0, 16:] = 5
    before, after = model.hidden_states_of_chunks(ids), model.hidden_states_of_chunks(changed)
    assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


def test_documents_in_a_block_do_not_see_each_other(model):
    first, second = torch.randint(3, 40, (1, 12)), torch.randint(3, 40, (1, 8))
    block = torch.cat([first, second], dim=1)
    hidden = model.hidden_states_of_chunks(block, position_ids=torch.tensor([[0, 1, 2, 0, 1]]))
    assert_close(hidden[:, :3], model.hidden_states_of_chunks(first), rtol=1e-4, atol=1e-5)
    assert_close(hidden[:, 3:], model.hidden_states_of_chunks(second), rtol=1e-4, atol=1e-5)


def test_only_targets_carry_loss(model):
    """The loss is the head's mean over chunks that have labels and do not start a document."""
    ids = torch.randint(3, 40, (1, 20))
    labels = ids.clone()
    labels[0, 16:] = -100
    positions = torch.tensor([[0, 1, 0, 1, 2]])
    hidden = model.hidden_states_of_chunks(ids, position_ids=positions)
    chunks = ids.view(5, 4)
    target = Target(model.autoencoder.encode(chunks[[1, 3]]), chunks[[1, 3]])
    expected = model.head.loss(hidden[0, [0, 2]], target, generator=torch.Generator().manual_seed(3))
    loss = model(ids, labels=labels, position_ids=positions, generator=torch.Generator().manual_seed(3)).loss
    assert_close(loss, expected.mean())
    scaled = model(
        ids,
        labels=labels,
        position_ids=positions,
        num_items_in_batch=torch.tensor(10),
        generator=torch.Generator().manual_seed(3),
    ).loss
    assert_close(scaled, expected.sum() / 10)


def test_batch_without_targets_has_zero_loss(model):
    ids = torch.zeros(1, 8, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    assert model(ids, labels=labels).loss == 0
    assert model(ids, labels=labels, num_items_in_batch=model.count_targets(labels)).loss == 0
    assert model.autoencoder.train()(ids, labels=labels).loss == 0
    assert tiny_llama().train()(ids, labels=labels).loss == 0


def test_padding_in_front_is_masked(model):
    ids = torch.randint(3, 40, (1, 8))
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    positions = torch.tensor([[0, 0, 0, 1]])
    hidden = model.hidden_states_of_chunks(padded, attention_mask=mask, position_ids=positions)
    assert_close(hidden[:, 2:], model.hidden_states_of_chunks(ids), rtol=1e-4, atol=1e-5)


def test_tokens_must_fill_chunks(model):
    with pytest.raises(ValueError, match="multiple of the chunk size 4, got 7"):
        model(torch.zeros(1, 7, dtype=torch.long))


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_saves_less_and_changes_nothing(head):
    """Most memory is in the blocks of the head, which work on N draws at every position."""
    depth = {"last_layers": 2} if head == "decoder" else {"num_blocks": 2}
    small = {"noise_size": 8} if head == "energy" else {}
    model = tiny_model(head_config={"head_type": head, **depth, **small})
    model.train()
    ids = torch.randint(3, 40, (2, 16))
    gradients, saved_sizes = [], []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        size = 0

        def count(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(ids, labels=ids, generator=torch.Generator().manual_seed(0)).loss
        saved_sizes.append(size)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(gradients[0], gradients[1])
    assert saved_sizes[1] < 0.7 * saved_sizes[0]


def test_condition_shared_between_draws_changes_nothing():
    """Computing the first layer of a block separately for draws and condition equals the joint product."""
    head: EnergyHead = tiny_model().head
    hidden, noise = torch.randn(5, 32), torch.rand(3, 5, 8) - 0.5
    condition = head.condition_norm(head.condition_in(hidden)).expand(3, -1, -1)
    draws = head.noise_norm(head.noise_in(noise))
    for block in head.blocks:
        inner = block.merge(torch.cat([block.norm(draws), condition], dim=-1))
        gate, up = block.gate_and_up(
            torch.nn.functional.silu(block.hidden(torch.nn.functional.silu(inner)))
        ).chunk(2, -1)
        draws = draws + block.down(torch.nn.functional.silu(gate) * up)
    expected = head.out(torch.nn.functional.silu(head.out_hidden(head.out_norm(draws))))
    assert_close(head.sample_latents(hidden, 3, noise=noise), expected, rtol=1e-4, atol=1e-5)


def test_draws_follow_the_generator_and_differ(model):
    hidden = torch.randn(4, 32)
    first, second = (model.head.sample_latents(hidden, 6, torch.Generator().manual_seed(1)) for _ in range(2))
    assert (first == second).all()
    assert first.std(0).min() > 0


def test_draws_of_a_new_head_are_zero():
    fresh = CalmForCausalLM(tiny_config())
    assert (fresh.head.sample_latents(torch.randn(2, 32), 4) == 0).all()


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_new_token_embeddings_have_the_configured_std(std):
    torch.manual_seed(0)
    weight = CalmForCausalLM(tiny_config(embedding_initializer_range=std)).get_input_embeddings().weight
    assert weight[1:].std().item() == pytest.approx(std, rel=0.1)
    assert not weight[0].any()  # Padding.
