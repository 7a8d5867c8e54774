"""Does a GPU agree with the CPU? States, losses, gradients and texts, with the same random numbers.

A part of `benchmarks/gpu.py`. Weights and random numbers are drawn on the CPU and copied. The CPU's float32
is compared with the device's float32, without TF32, and with its bf16 autocast. A difference is the largest
one between entries of two tensors, relative to the largest entry; for gradients, that of the worst tensor.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import DEVICE, Cases, Row
from torch import Tensor, nn

from calm.core.random import PredrawnNumbers, RequestRecorder, numbers_for
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig

HEADS: dict[str, dict[str, Any]] = {
    "energy": {"head_type": "energy"},
    "energy, integrated": {"head_type": "energy", "num_posterior_draws": 0},
    "flow": {"head_type": "flow"},
    "diffusion": {"head_type": "diffusion", "num_steps": 25},
    "categorical_flow": {"head_type": "categorical_flow"},
    "sequential": {"head_type": "sequential"},
}
WITH_CODES = ("categorical_flow", "sequential")
# For comparison, on a CPU: float32 differs from float64 by up to 9e-7, 1e-7 and 2e-5, and bf16 from float32
# by up to 0.02, 3e-3 and 0.3.
BOUNDS = {
    "float32": {"states": 1e-5, "loss": 1e-5, "gradients": 2e-4},
    "bf16": {"states": 0.05, "loss": 0.01, "gradients": 0.6},
}
MAX_SHARE_DIFFERING = 0.1  # Of rows: rounding decides between two tokens that are almost equally likely.


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models and batches that are compared.

    Args:
        width: Width of the backbone and of the autoencoder.
        layers: Layers of the backbone.
        vocab_size: Number of tokens.
        rows: Rows of a batch.
        chunks: Chunks of a row, and of a generated text.
    """

    width: int = 256
    layers: int = 4
    vocab_size: int = 4096
    rows: int = 16
    chunks: int = 32


@dataclass(frozen=True)
class Result:
    """Outputs of a network for a batch: states or logits, the loss, and the gradient of each parameter."""

    states: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    def differences(self, other: "Result") -> dict[str, float]:
        """How far another result is from this one: states, loss, and the worst gradient."""
        worst = max(
            (difference(gradient, other.gradients[name]) for name, gradient in self.gradients.items()),
            key=_or_infinite,
        )
        return {
            "states": difference(self.states, other.states),
            "loss": difference(self.loss, other.loss),
            "gradients": worst,
        }


def cases(sizes: Sizes) -> Cases:
    """Cases: each head and the autoencoder, then the text of each head."""
    torch.set_float32_matmul_precision("highest")
    heads: Cases = {name: partial(_compare_model, name, sizes) for name in HEADS}
    texts: Cases = {f"{name}, text": partial(_compare_texts, name, sizes) for name in HEADS}
    return heads | {"autoencoder": partial(_compare_autoencoder, sizes)} | texts


def difference(reference: Tensor, other: Tensor) -> float:
    """Largest difference between the entries of two tensors, relative to the reference's largest entry."""
    reference, other = reference.detach().cpu().double(), other.detach().cpu().double()
    distance, scale = float((reference - other).abs().max()), float(reference.abs().max())
    return distance / scale if scale else (0.0 if distance == 0 else math.inf)


def copied(network: nn.Module, device: str = DEVICE) -> Any:
    """A copy of a network on a device."""
    return copy.deepcopy(network).to(device)


def _compare_model(name: str, sizes: Sizes, until: float) -> list[Row]:
    half = torch.arange(sizes.chunks // 2)  # Two documents in a row, which do not see each other.
    model = _model(name, sizes)
    inputs = _inputs(sizes) | {"position_ids": torch.cat([half, half]).repeat(sizes.rows, 1)}
    return [_compared(model.train(), inputs)]


def _compare_texts(name: str, sizes: Sizes, until: float) -> list[Row]:
    differing = _rows_that_differ(_model(name, sizes).eval(), sizes)
    is_many = differing > MAX_SHARE_DIFFERING * sizes.rows
    return [
        {
            "texts alike": f"{sizes.rows - differing} of {sizes.rows}",
            "problem": f"{differing} texts differ" if is_many else "",
        }
    ]


def _compare_autoencoder(sizes: Sizes, until: float) -> list[Row]:
    torch.manual_seed(0)
    autoencoder = spread(CalmAutoencoder(_config("energy", sizes).autoencoder))
    return [_compared(autoencoder.train(), _inputs(sizes))]


def _model(name: str, sizes: Sizes) -> CalmForCausalLM:
    torch.manual_seed(0)
    return spread(CalmForCausalLM(_config(name, sizes)))


def spread(network: Any) -> Any:
    """Give a network larger weights than a new one has, so that all of its inputs affect its outputs."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding) and module.weight.requires_grad:
            nn.init.normal_(module.weight)
    return network


def _inputs(sizes: Sizes) -> dict[str, Tensor]:
    ids = torch.randint(4, sizes.vocab_size, (sizes.rows, 4 * sizes.chunks))
    return {"input_ids": ids, "labels": ids}


def _config(name: str, sizes: Sizes) -> CalmConfig:
    return CalmConfig(
        autoencoder_config=CalmAutoencoderConfig(
            kind="codes" if name in WITH_CODES else "mlp",
            vocab_size=sizes.vocab_size,
            chunk_size=4,
            latent_size=64,
            hidden_size=sizes.width,
            intermediate_size=2 * sizes.width,
        ),
        backbone_config={
            "hidden_size": sizes.width,
            "intermediate_size": 2 * sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        head_config=HEADS[name],
    )


def _compared(network: Any, inputs: dict[str, Tensor]) -> Row:
    """Differences of the device from the CPU, and a problem if they are too large."""
    generators = [torch.Generator().manual_seed(number) for number in range(len(inputs["input_ids"]))]
    noise = network.draw_training_noise(generators, **inputs)
    reference = result_of(network, inputs, noise)
    row: Row = {}
    too_large = []
    for precision, bounds in BOUNDS.items():
        differences = reference.differences(
            result_of(copied(network), inputs, noise, DEVICE, is_half=precision == "bf16")
        )
        for kind, size in differences.items():
            row[f"{kind}, {precision}"] = size
            if not size <= bounds[kind]:  # True for NaN, too.
                too_large.append(f"{kind} in {precision} differ by {size:.1e}, more than {bounds[kind]:g}")
    row["problem"] = "; ".join(too_large)
    return row


def result_of(
    network: Any, inputs: dict[str, Tensor], noise: Any, device: str = "cpu", is_half: bool = False
) -> Result:
    """Outputs and gradients of a network.

    Args:
        network: A CALM or an autoencoder, on the device.
        inputs: Arguments of its forward pass.
        noise: Its training noise.
        device: The device.
        is_half: Whether to use bf16 autocast.
    """
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    if noise is not None:
        noise = type(noise)(*(part if part is None else part.to(device) for part in noise))
    network.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=is_half):
        with torch.no_grad():
            states = network(inputs["input_ids"], noise=noise)[0]
        loss = network(**inputs, noise=noise).loss
    loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None
    }
    return Result(states, loss, gradients)


def _rows_that_differ(model: CalmForCausalLM, sizes: Sizes) -> int:
    """Number of texts at T = 1 that differ between the device and the CPU, from the same random numbers."""
    prompt = torch.randint(4, sizes.vocab_size, (sizes.rows, 8))
    recorder = RequestRecorder()
    model.head.draw_chunks(model.head.prepare(torch.zeros(1, model.config.state_size)), 1, recorder)
    numbers = []
    for _ in range(sizes.chunks):
        numbers += numbers_for(recorder.requests, 1, sizes.rows, None)
    texts = []
    for device, writer in (("cpu", model), (DEVICE, copied(model))):
        given: Any = PredrawnNumbers([drawn.to(device) for drawn in numbers])
        text: Any = writer.generate(
            prompt.to(device), generator=given, temperature=1.0, max_new_tokens=4 * sizes.chunks
        )
        texts.append(text.cpu())
    return int((texts[0] != texts[1]).any(-1).sum())


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
