"""Fixtures shared by tests of models."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture
def norms_in_double_precision(monkeypatch):
    """Llama's RMS norm without transformers' rounding to single precision."""

    def forward(self, hidden_states):
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
