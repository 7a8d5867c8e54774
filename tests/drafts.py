"""Draft models, target models that accept or reject, and the distribution of the texts of a target."""

import torch
from scipy import stats
from tiny import tiny_llama, tiny_model


def drafting_model(head_type="sequential", chunk_size=4, head=None, **changes):
    """A random CALM in double precision, with the same weights each time."""
    torch.manual_seed(1)
    return tiny_model(chunk_size, head_config={"head_type": head_type} | (head or {}), **changes).double()


def deciding_model(vocab_size=40, **changes):
    """A random target model: a Llama in double precision, whose distributions are far from uniform."""
    torch.manual_seed(2)
    model = tiny_llama(vocab_size=vocab_size, initializer_range=0.5, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.generation_config.eos_token_id = None
    return model


def some_prompts(lengths, vocab_size=40):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab_size, (1, length), generator=generator) for length in lengths]


def distribution_of_texts(model, prompt, length, temperature=1.0):
    """The probability of each text of `length` tokens after a prompt, {tokens: probability}."""
    probabilities = {(): 1.0}
    for _ in range(length):
        texts = list(probabilities)
        with torch.no_grad():
            logits_PV = model(torch.tensor([[*prompt, *text] for text in texts])).logits[:, -1]
        rows = (logits_PV / temperature).softmax(-1).tolist()
        probabilities = {
            (*text, token): probabilities[text] * share
            for text, row in zip(texts, rows, strict=True)
            for token, share in enumerate(row)
        }
    return probabilities


def p_value(texts, probabilities):
    """The p-value of a chi-square test of texts against their distribution; rare texts share a bin."""
    number, counts = len(texts), dict.fromkeys(probabilities, 0)
    for text in texts:
        counts[text] += 1
    common = [text for text, share in probabilities.items() if share * number >= 5]
    observed = [counts[text] for text in common]
    expected = [probabilities[text] * number for text in common]
    if len(common) < len(counts):
        observed.append(number - sum(observed))
        expected.append(number - sum(expected))
    return stats.chisquare(observed, expected).pvalue
