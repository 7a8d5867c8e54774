"""Distillation: against the teacher run on each document alone, and torch's KL divergence."""

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS, PAD, tiny_llama, tiny_model
from torch.testing import assert_close

from calm.core.chunks import find_targets
from calm.data.chunking import make_blocks
from calm.models.distillation import TeacherOutput, token_positions
from calm.models.uptraining import Cut, calm_from_transformer
from calm.training.batches import collate_chunks, collate_tokens
from calm.training.recipe import TeacherSettings
from calm.training.teacher import Teacher

SIZE, CONTEXT = 4, 24
generator = torch.Generator().manual_seed(3)
# More than a block holds, so one document is cut; the last block ends with padding.
DOCUMENTS = [torch.randint(3, 40, (n,), generator=generator).tolist() for n in (9, 1, 14, 3, 30, 6)]


def batch_of(chunk_size: int, layout: str = "documents") -> dict:
    columns = make_blocks(
        DOCUMENTS, list(range(len(DOCUMENTS))), chunk_size=chunk_size, block_size=CONTEXT, eos_token_id=EOS,
        pad_token_id=PAD, layout=layout,
    )  # fmt: skip
    rows = [{name: torch.tensor(column[row]) for name, column in columns.items() if name != "document_ids"}
            for row in range(len(columns["input_ids"]))]  # fmt: skip
    batch = (collate_chunks if chunk_size > 1 else collate_tokens)(rows)
    return {name: value for name, value in batch.items() if name != "block_numbers"}


class Tokenizer(list):
    """What a conversion needs from a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id = PAD, 1, EOS


TOKENIZER = Tokenizer(range(40))


def with_large_weights(network):
    """Scale the matrices of a network, so that its distributions differ from each other."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    return network


def teacher_for(chunk_size: int, **settings) -> Teacher:
    network = with_large_weights(tiny_llama(num_hidden_layers=3))
    return Teacher(network, TeacherSettings(model="teacher", **settings), chunk_size)


def documents_in(batch: dict, chunk_size: int) -> list[tuple[int, list[int]]]:
    """Row and token indices of each document in a batch."""
    documents: list[tuple[int, list[int]]] = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        for chunk, position in enumerate(positions):
            if position == 0 or not documents or documents[-1][0] != row:
                documents.append((row, []))
            indices = range(chunk * chunk_size, (chunk + 1) * chunk_size)
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            documents[-1][1].extend(
                index for index in indices if labels[index] != -100 or (chunk_size == 1 and ids[index] != PAD)
            )
    return [document for document in documents if document[1]]


def logits_by_document(network, batch: dict, chunk_size: int) -> torch.Tensor:
    """Logits (B, T, V) of each token, given those before it in its document; NaN for all others."""
    logits = torch.full((*batch["input_ids"].shape, 40), torch.nan, dtype=torch.float64)
    for row, indices in documents_in(batch, chunk_size):
        with torch.no_grad():
            document_logits = network(input_ids=batch["input_ids"][row, indices][None]).logits[0]
        logits[row, indices[1:]] = document_logits[:-1]
    return logits


def expected_loss(model, teacher: Teacher, batch: dict) -> torch.Tensor:
    """Mean loss over the tokens of all target chunks, from full distributions."""
    weight, temperature = teacher.settings.weight, teacher.settings.temperature
    teacher_logits = logits_by_document(teacher.network, batch, SIZE)
    is_target = find_targets(batch["labels"], batch["position_ids"], SIZE)
    states = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    states, total = states[:, :-1][is_target], 0.0
    chunks = [batch[name].unflatten(-1, (-1, SIZE))[:, 1:][is_target] for name in ("input_ids", "labels")]
    teacher_logits = teacher_logits.unflatten(1, (-1, SIZE))[:, 1:][is_target]
    for index in range(SIZE):
        log_p = model.head.token_distribution(model.head.prepare(states), chunks[0], index).double().log()
        cross_entropy = F.nll_loss(log_p, chunks[0][:, index], reduction="none")
        log_q, log_p = (
            (logits / temperature).log_softmax(-1) for logits in (teacher_logits[:, index], log_p)
        )
        divergence = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        has_label = chunks[1][:, index] != -100
        mixture = (1 - weight) * cross_entropy + weight * divergence
        total = total + torch.where(has_label, mixture, cross_entropy).sum()
    assert teacher_logits[chunks[1] != -100].isfinite().all() and (chunks[1] == -100).any()
    return total / (SIZE * len(states))


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("head_type", ["sequential", "decoder"])
def test_calm_learns_from_the_teacher_at_every_token(head_type, layout):
    torch.manual_seed(1)
    model = tiny_model(SIZE, head_config={"head_type": head_type}).double()
    teacher, batch = teacher_for(SIZE, weight=0.75, temperature=2.0), batch_of(SIZE, layout)
    teacher_output = teacher.output(**batch)
    with torch.no_grad():
        loss = model(**batch, teacher_output=teacher_output).loss
        expected = expected_loss(model, teacher, batch)
    assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    model.train()
    assert_close(model(**batch, teacher_output=teacher_output).loss.detach(), loss, rtol=1e-6, atol=0)
    assert (model(**batch).loss.detach() - loss).abs() > 0.01


def test_token_level_model_learns_from_the_teacher():
    student, batch = tiny_llama(), batch_of(1)
    teacher = teacher_for(1, weight=0.75, temperature=2.0)
    with torch.no_grad():
        loss = student(**batch, teacher_output=teacher.output(**batch)).loss
        teacher_logits, logits = (
            logits_by_document(network, batch, 1) for network in (teacher.network, student)
        )
    is_target = (batch["labels"] != -100)[:, 1:]
    teacher_logits, logits = (tensor[:, 1:][is_target] for tensor in (teacher_logits, logits))
    cross_entropy = F.cross_entropy(logits, batch["labels"][:, 1:][is_target])
    log_p, log_q = ((tensor / 2).log_softmax(-1) for tensor in (logits, teacher_logits))
    divergence = 4 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert_close(loss.double(), 0.25 * cross_entropy + 0.75 * divergence, rtol=1e-6, atol=0)


def test_relative_distance_is_zero_for_equal_states_and_one_for_zeros():
    """With chunks of one token, the backbone is the first layers of the source."""
    source = with_large_weights(tiny_llama(num_hidden_layers=6))
    model = calm_from_transformer(source, TOKENIZER, 1, Cut(0, 2))
    teacher = Teacher(source, TeacherSettings(model="source", states=0.5), 1, layer=3)
    batch = {**batch_of(1), "use_cache": False}
    teacher_output = teacher.output(**batch)
    is_target = find_targets(batch["labels"], batch["position_ids"], 1)
    states = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    states = states[:, :-1][is_target][:, : model.config.hidden_size]
    assert teacher_output.distances(states, is_target, 1).max() < 1e-12
    assert teacher_output.distances(0 * states, is_target, 1).eq(1).all()


def test_model_equal_to_its_teacher_has_no_loss_and_no_gradient():
    """With chunks of one token and no layers in the head, the CALM is the source."""
    source = with_large_weights(tiny_llama(num_hidden_layers=6))
    model = calm_from_transformer(source, TOKENIZER, 1, Cut(0, 0))
    teacher = Teacher(source, TeacherSettings(model="source", states=0.5), 1, layer=3)
    batch = {**batch_of(1), "use_cache": False}
    teacher_output = teacher.output(**batch)._replace(hidden_BTD=None)
    loss = model(**batch, teacher_output=teacher_output).loss
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert max(float(weight.grad.abs().max()) for weight in model.backbone.layers.parameters()) < 1e-9


def test_states_are_compared_at_the_last_token_of_a_chunk():
    source = with_large_weights(tiny_llama(num_hidden_layers=6))
    model = calm_from_transformer(source, TOKENIZER, SIZE, Cut(0, 2))
    batch = batch_of(SIZE)
    teacher = Teacher(source, TeacherSettings(model="source", weight=0.0, states=0.5), SIZE, layer=3)
    teacher_output = teacher.output(**batch)
    total, count = 0.0, 0
    is_target = find_targets(batch["labels"], batch["position_ids"], SIZE)
    states = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    for row, indices in documents_in(batch, SIZE):
        outputs = source(batch["input_ids"][row, indices][None], output_hidden_states=True)
        for index, expected in zip(indices, outputs.hidden_states[4][0], strict=True):
            chunk, position = divmod(index, SIZE)
            if position == SIZE - 1 and chunk < CONTEXT // SIZE - 1 and is_target[row, chunk]:
                state = states[row, chunk, : model.config.hidden_size]
                total += float((state - expected).square().sum() / expected.square().sum())
                count += 1
    assert count == int(is_target.sum())
    loss = model(**batch, teacher_output=teacher_output).loss - model(**batch).loss
    assert float(loss) == pytest.approx(0.5 * total / count, rel=1e-5)


def test_token_positions_start_at_each_document_after_its_padding():
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100, -100, -100, 8, 9, -100, -100]])
    positions = torch.tensor([[0, 1, 0]])
    assert token_positions(labels, positions, 4).tolist() == [[0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0, 0]]
    tokens = torch.arange(12)[None]
    assert token_positions(tokens, torch.arange(3)[None], 4).tolist() == tokens.tolist()
    assert token_positions(labels, None, 4) is None


def test_head_without_token_distributions_is_refused():
    batch = batch_of(SIZE)
    teacher_output = teacher_for(SIZE).output(**batch)
    assert isinstance(teacher_output, TeacherOutput)
    with pytest.raises(ValueError, match="energy head has no token distributions"):
        tiny_model(SIZE)(**batch, teacher_output=teacher_output)


def test_teacher_with_thoughts_is_refused():
    batch = batch_of(1)
    is_thought = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    is_thought[:, 3] = True
    with pytest.raises(ValueError, match="a teacher is not supported with thoughts"):
        tiny_llama(vocab_size=40).train()(
            **batch, is_thought=is_thought, teacher_output=teacher_for(1).output(**batch)
        )
