"""What a model hears of a teacher: against the teacher alone with each document, by torch's divergence."""

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


class Tokens(list):
    """What a conversion asks of a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id = PAD, 1, EOS


TOKENS = Tokens(range(40))


def louder(network):
    """A network whose distributions are not all alike."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    return network


def teacher_for(chunk_size: int, **settings) -> Teacher:
    network = louder(tiny_llama(num_hidden_layers=3))
    return Teacher(network, TeacherSettings(model="teacher", **settings), chunk_size)


def documents_in(batch: dict, chunk_size: int) -> list[tuple[int, list[int]]]:
    """The rows and places of the tokens of each document in a batch, found one by one."""
    found: list[tuple[int, list[int]]] = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        for chunk, position in enumerate(positions):
            if position == 0 or not found or found[-1][0] != row:
                found.append((row, []))
            places = range(chunk * chunk_size, (chunk + 1) * chunk_size)
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            found[-1][1].extend(
                place for place in places if labels[place] != -100 or (chunk_size == 1 and ids[place] != PAD)
            )
    return [one for one in found if one[1]]


def scores_by_document(network, batch: dict, chunk_size: int) -> torch.Tensor:
    """Scores (B, T, V) that a teacher gives each token, from those before it in its document; else NaN."""
    scores = torch.full((*batch["input_ids"].shape, 40), torch.nan, dtype=torch.float64)
    for row, places in documents_in(batch, chunk_size):
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"][row, places][None]).logits[0]
        scores[row, places[1:]] = logits[:-1]
    return scores


def expected_loss(model, teacher: Teacher, batch: dict) -> torch.Tensor:
    """Mean over targets of the loss at every place, from whole distributions."""
    weight, temperature = teacher.settings.weight, teacher.settings.temperature
    told = scores_by_document(teacher.network, batch, SIZE)
    is_target = find_targets(batch["labels"], batch["position_ids"], SIZE)
    states = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    states, total = states[:, :-1][is_target], 0.0
    chunks = [batch[name].unflatten(-1, (-1, SIZE))[:, 1:][is_target] for name in ("input_ids", "labels")]
    told = told.unflatten(1, (-1, SIZE))[:, 1:][is_target]
    for place in range(SIZE):
        log_p = model.head.token_distribution(states, chunks[0], place).double().log()
        own = F.nll_loss(log_p, chunks[0][:, place], reduction="none")
        log_q, log_p = ((scores / temperature).log_softmax(-1) for scores in (told[:, place], log_p))
        far = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        has_label = chunks[1][:, place] != -100
        total = total + torch.where(has_label, (1 - weight) * own + weight * far, own).sum()
    assert told[chunks[1] != -100].isfinite().all() and (chunks[1] == -100).any()
    return total / (SIZE * len(states))


@pytest.mark.parametrize("layout", ["documents", "packed"])
@pytest.mark.parametrize("head_type", ["sequential", "decoder"])
def test_every_place_of_a_calm_hears_the_teacher(head_type, layout):
    torch.manual_seed(1)
    model = tiny_model(SIZE, head_config={"head_type": head_type}).double()
    teacher, batch = teacher_for(SIZE, weight=0.75, temperature=2.0), batch_of(SIZE, layout)
    teacher_output = teacher.output(**batch)
    with torch.no_grad():
        loss = model(**batch, teacher_output=teacher_output).loss
        wanted = expected_loss(model, teacher, batch)
    assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    model.train()
    assert_close(model(**batch, teacher_output=teacher_output).loss.detach(), loss, rtol=1e-6, atol=0)
    assert (model(**batch).loss.detach() - loss).abs() > 0.01


def test_a_transformer_of_tokens_hears_the_teacher():
    student, batch = tiny_llama(), batch_of(1)
    teacher = teacher_for(1, weight=0.75, temperature=2.0)
    with torch.no_grad():
        loss = student(**batch, teacher_output=teacher.output(**batch)).loss
        told, own_scores = (scores_by_document(one, batch, 1) for one in (teacher.network, student))
    is_target = (batch["labels"] != -100)[:, 1:]
    told, own_scores = (scores[:, 1:][is_target] for scores in (told, own_scores))
    own = F.cross_entropy(own_scores, batch["labels"][:, 1:][is_target])
    log_p, log_q = ((scores / 2).log_softmax(-1) for scores in (own_scores, told))
    far = 4 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert_close(loss.double(), 0.25 * own + 0.75 * far, rtol=1e-6, atol=0)


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    """With chunks of one token and no layers in the head, the CALM is the source."""
    source = louder(tiny_llama(num_hidden_layers=6))
    model = calm_from_transformer(source, TOKENS, 1, Cut(0, 2))
    teacher = Teacher(source, TeacherSettings(model="source", states=0.5), 1, layer=3)
    batch = {**batch_of(1), "use_cache": False}
    teacher_output = teacher.output(**batch)
    is_target = find_targets(batch["labels"], batch["position_ids"], 1)
    states = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    own = states[:, :-1][is_target][:, : model.config.hidden_size]
    assert teacher_output.distances(own, is_target, 1).max() < 1e-12
    assert teacher_output.distances(0 * own, is_target, 1).eq(1).all()
    whole = calm_from_transformer(source, TOKENS, 1, Cut(0, 0))
    teacher_output = teacher.output(**batch)._replace(hidden_BTD=None)
    loss = whole(**batch, teacher_output=teacher_output).loss
    loss.backward()
    assert abs(float(loss)) < 1e-12
    assert max(float(one.grad.abs().max()) for one in whole.backbone.layers.parameters()) < 1e-9


def test_states_are_compared_at_the_last_token_of_a_chunk():
    source = louder(tiny_llama(num_hidden_layers=6))
    model = calm_from_transformer(source, TOKENS, SIZE, Cut(0, 2))
    batch = batch_of(SIZE)
    teacher = Teacher(source, TeacherSettings(model="source", weight=0.0, states=0.5), SIZE, layer=3)
    teacher_output = teacher.output(**batch)
    total, count = 0.0, 0
    is_target = find_targets(batch["labels"], batch["position_ids"], SIZE)
    states = model.hidden_states_of_chunks(batch["input_ids"], position_ids=batch["position_ids"])
    for row, places in documents_in(batch, SIZE):
        read = source(batch["input_ids"][row, places][None], output_hidden_states=True).hidden_states[4][0]
        for place, wanted in zip(places, read, strict=True):
            chunk, inside = divmod(place, SIZE)
            if inside == SIZE - 1 and chunk < CONTEXT // SIZE - 1 and is_target[row, chunk]:
                own = states[row, chunk, : model.config.hidden_size]
                total += float((own - wanted).square().sum() / wanted.square().sum())
                count += 1
    assert count == int(is_target.sum())
    loss = model(**batch, teacher_output=teacher_output).loss - model(**batch).loss
    assert float(loss) == pytest.approx(0.5 * total / count, rel=1e-5)


def test_positions_begin_with_each_document_behind_its_padding():
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100, -100, -100, 8, 9, -100, -100]])
    positions = torch.tensor([[0, 1, 0]])
    assert token_positions(labels, positions, 4).tolist() == [[0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0, 0]]
    whole = torch.arange(12)[None]
    assert token_positions(whole, torch.arange(3)[None], 4).tolist() == whole.tolist()
    assert token_positions(labels, None, 4) is None


def test_heads_without_distributions_of_tokens_cannot_learn():
    batch = batch_of(SIZE)
    teacher_output = teacher_for(SIZE).output(**batch)
    assert isinstance(teacher_output, TeacherOutput)
    with pytest.raises(ValueError, match="energy head has no token distributions"):
        tiny_model(SIZE)(**batch, teacher_output=teacher_output)


def test_a_teacher_and_thoughts_do_not_go_together():
    batch = batch_of(1)
    is_thought = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    is_thought[:, 3] = True
    with pytest.raises(ValueError, match="a teacher is not supported with thoughts"):
        tiny_llama(vocab_size=40).train()(
            **batch, is_thought=is_thought, teacher_output=teacher_for(1).output(**batch)
        )
