"""A CPU imitates what torch does differently on a GPU."""

import pytest
import torch
from torch.nn import functional

from calm.planning.as_gpu import AsGpu

X = torch.ones(2, 4, dtype=torch.bfloat16)


def test_autocast_is_that_of_cuda():
    """Documented: CUDA autocasts norms and powers to float32; a CPU leaves them in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.layer_norm(X, (4,)).dtype == X.pow(2).dtype == torch.bfloat16
        with AsGpu():
            for result in (functional.layer_norm(X, (4,)), X.pow(2), X.softmax(-1), X.sum(), torch.exp(X)):
                assert result.dtype == torch.float32
            assert (X @ X.T).dtype == functional.linear(X.float(), X.float()).dtype == torch.bfloat16
            assert X.long().sum().dtype == torch.long


def test_without_autocast_nothing_is_cast():
    with AsGpu():
        assert functional.layer_norm(X, (4,)).dtype == torch.bfloat16


@pytest.mark.parametrize("is_gpu", [True, False])
def test_tensors_claim_to_be_on_the_gpu(is_gpu):
    with AsGpu(is_gpu=is_gpu):
        assert X.is_cuda == is_gpu and X.is_cpu != is_gpu
    assert X.is_cpu
