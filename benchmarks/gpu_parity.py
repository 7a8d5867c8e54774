"""Does a GPU say what a CPU says? States, losses, gradients and text of the same weights and random numbers.

A part of `benchmarks/gpu.py`. All is drawn on the CPU and copied. What is compared with the CPU's float32 is
the device's float32, without TF32, and its bf16 autocast. A difference is the largest of a tensor's entries,
relative to the largest entry; of gradients it is that of the worst tensor.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measure import DEVICE, Cases, Row
from torch import Tensor, nn

from calm.core.random import GivenNumbers, RequestRecorder, numbers_for
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
# On a CPU, float32 is up to 9e-7, 1e-7 and 2e-5 from float64, and bf16 0.02, 3e-3 and 0.3 from float32.
BOUNDS = {
    "float32": {"states": 1e-5, "loss": 1e-5, "gradients": 2e-4},
    "bf16": {"states": 0.05, "loss": 0.01, "gradients": 0.6},
}
MOST_ROWS_THAT_DIFFER = 0.1  # Two likeliest tokens may be so near that rounding decides.


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is compared.

    Args:
        width: Of the backbone and the autoencoder.
        layers: Of the backbone.
        vocab_size: Tokens.
        rows: Rows of a batch.
        chunks: Chunks of a row, and chunks written.
    """

    width: int = 256
    layers: int = 4
    vocab_size: int = 4096
    rows: int = 16
    chunks: int = 32


@dataclass(frozen=True)
class Result:
    """What a network says of a batch: states or scores, a loss, and gradients by parameter."""

    states: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]

    def differences(self, other: "Result") -> dict[str, float]:
        """How far another result is from this one, for each kind of figure."""
        worst = max(
            (difference(own, other.gradients[name]) for name, own in self.gradients.items()), key=_or_infinite
        )
        return {
            "states": difference(self.states, other.states),
            "loss": difference(self.loss, other.loss),
            "gradients": worst,
        }


def cases(sizes: Sizes) -> Cases:
    """Each head and the autoencoder, then what each head writes."""
    torch.set_float32_matmul_precision("highest")
    of_heads: Cases = {name: partial(_compare_model, name, sizes) for name in HEADS}
    of_texts: Cases = {f"{name}, text": partial(_compare_texts, name, sizes) for name in HEADS}
    return of_heads | {"autoencoder": partial(_compare_autoencoder, sizes)} | of_texts


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors' entries, relative to the first one's largest entry."""
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    distance, scale = float((one - other).abs().max()), float(one.abs().max())
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
    is_many = differing > MOST_ROWS_THAT_DIFFER * sizes.rows
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
    """The network with weights so large that all it is given shows in what it says, unlike a new one's."""
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
        found = reference.differences(
            result_of(copied(network), inputs, noise, DEVICE, is_half=precision == "bf16")
        )
        for kind, figure in found.items():
            row[f"{kind}, {precision}"] = figure
            if not figure <= bounds[kind]:  # So what is not a number is too large.
                too_large.append(f"{kind} in {precision} differ by {figure:.1e}, more than {bounds[kind]:g}")
    row["problem"] = "; ".join(too_large)
    return row


def result_of(
    network: Any, inputs: dict[str, Tensor], noise: Any, device: str = "cpu", is_half: bool = False
) -> Result:
    """Forward and backward pass of a network that is on the device.

    Args:
        network: A CALM or an autoencoder.
        inputs: Arguments of its forward pass.
        noise: Recorded training noise.
        device: Where it is.
        is_half: Whether under bf16 autocast.
    """
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    noise = None if noise is None else type(noise)(*(one if one is None else one.to(device) for one in noise))
    network.zero_grad()
    with torch.autocast(device, torch.bfloat16, enabled=is_half):
        with torch.no_grad():
            states = network(inputs["input_ids"], noise=noise)[0]
        loss = network(**inputs, noise=noise).loss
    loss.backward()
    gradients = {name: one.grad for name, one in network.named_parameters() if one.grad is not None}
    return Result(states, loss, gradients)


def _rows_that_differ(model: CalmForCausalLM, sizes: Sizes) -> int:
    """Texts at T = 1 that the device writes otherwise than the CPU, of the same random numbers."""
    prompt = torch.randint(4, sizes.vocab_size, (sizes.rows, 8))
    noted = RequestRecorder()
    model.head.draw_chunks(model.head.prepare(torch.zeros(1, model.config.state_size)), 1, noted)
    numbers = [one for _ in range(sizes.chunks) for one in numbers_for(noted.requests, 1, sizes.rows, None)]
    texts = []
    for device, writer in (("cpu", model), (DEVICE, copied(model))):
        given: Any = GivenNumbers([one.to(device) for one in numbers])
        text: Any = writer.generate(
            prompt.to(device), generator=given, temperature=1.0, max_new_tokens=4 * sizes.chunks
        )
        texts.append(text.cpu())
    return int((texts[0] != texts[1]).any(-1).sum())


def _or_infinite(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure
