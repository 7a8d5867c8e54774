"""The autoregressive baseline: packed documents do not see each other, nor predict each other's start."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from calm.core.chunks import find_targets
from calm.data.chunking import make_blocks
from calm.training.batches import collate_tokens

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
EOS, PAD = 1, 0


def test_packed_loss_is_the_token_mean_over_separate_documents():
    arrays = make_blocks(
        DOCUMENTS, [0, 1, 2, 3], chunk_size=1, block_size=16, eos_token_id=EOS, pad_token_id=PAD
    )
    assert len(arrays["input_ids"]) == 1
    batch = collate_tokens([{name: torch.from_numpy(rows[0]) for name, rows in arrays.items()}])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.5, **sizes)).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for document in DOCUMENTS:
            tokens = torch.tensor([[*document, EOS]])
            distribution = model(tokens).logits[0, :-1].log_softmax(-1)
            total -= float(distribution.gather(1, tokens[0, 1:, None]).sum())
            count += len(document)
        loss = model(**batch).loss
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    # The Trainer divides by the number of labels that are not ignored.
    assert int(find_targets(batch["labels"], batch["position_ids"], 1).sum()) == count
