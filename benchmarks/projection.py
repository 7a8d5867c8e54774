"""How long does it take to find the likeliest tokens of decoder outputs?

    python benchmarks/projection.py                 # 128,256 tokens of 512, with and without structure
    python benchmarks/projection.py runs/demo/model # the embeddings and decoder outputs of a model

It compares, in turns in one process, the argmax of all logits (the obvious way) with slices of the vocabulary
and a running maximum. "Structure" gives random embeddings the spectrum of the demo's trained ones (77% of the
energy in a 16th of the directions, 84% in an eighth, 90% in a quarter, 95% in a half). Tokens that differ
from the obvious way are counted.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from transformers import AutoTokenizer

import calm  # noqa: F401
from calm.core.argmax import argmax_of_logits
from calm.data.stories import stories
from calm.models.calm import CalmForCausalLM


def obvious(vectors: Tensor, weight: Tensor) -> Tensor:
    """The argmax of all logits at once."""
    return (vectors @ weight.T).argmax(-1)


def structured(size: int, width: int, generator: torch.Generator) -> Tensor:
    """Random embeddings with the spectrum of trained ones."""
    energy = torch.empty(width)
    borders = [0, width // 16, width // 8, width // 4, width // 2, width]
    for share, low, high in zip((0.77, 0.07, 0.06, 0.05, 0.05), borders, borders[1:], strict=False):
        energy[low:high] = share / (high - low)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (torch.randn(size, width, generator=generator) * energy.sqrt()) @ rotation


def cases(folder: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (vectors to decode, embeddings)."""
    generator = torch.Generator().manual_seed(0)
    if folder:
        model = CalmForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [ids[:64] for ids in tokenizer(list(stories(7, 64)))["input_ids"] if len(ids) >= 64][:4]
        with torch.no_grad():
            hidden_PD = model.hidden_states_of_chunks(torch.tensor(ids)).flatten(0, 1)[1::8]
            latents = model.head.sample_latents(hidden_PD, 200, generator)
            vectors = model.autoencoder.decoder(latents).flatten(0, 2)
        vectors = vectors[torch.randperm(len(vectors), generator=generator)[:800]]
        weight = model.autoencoder.get_input_embeddings().weight.detach()
        return {f"{folder}, {len(vectors)} vectors": (vectors, weight)}
    size, width = 128_256, 512
    vectors_and_weights = {}
    for name, weight in (
        ("no structure", torch.randn(size, width, generator=generator) / width**0.5),
        ("structure", structured(size, width, generator)),
    ):
        for num_vectors in (64, 800):  # 16 and 200 draws of chunks of 4.
            tokens = torch.randint(size, (num_vectors,), generator=generator)
            noise = torch.randn(num_vectors, width, generator=generator)
            # A decoder's output points at its token; the noise is about as long as the embedding.
            vectors = weight[tokens] + noise * weight[tokens].norm(dim=1, keepdim=True) / width**0.5
            vectors_and_weights[f"{name}, {num_vectors} vectors"] = (vectors, weight)
    return vectors_and_weights


@torch.no_grad()
def main() -> None:
    """Time all methods on all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name, (vectors, weight) in cases(arguments.folder).items():
        methods = {"slices": lambda v, w=weight: argmax_of_logits(v, w)}
        methods["obvious"] = lambda v, w=weight: obvious(v, w)
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        num_differing: dict[str, int] = {}
        expected = obvious(vectors, weight)
        for _ in range(arguments.rounds):
            for method, run in methods.items():
                start = time.perf_counter()
                tokens = run(vectors)
                seconds[method].append(time.perf_counter() - start)
                num_differing[method] = int((tokens != expected).sum())
        for method, values in seconds.items():
            ratios = [a / b for a, b in zip(seconds["obvious"], values, strict=True)]
            print(
                f"{name}  {method:10s}: {1e3 * statistics.median(values):8.1f} ms, "
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) the speed of "
                f"the obvious way, {num_differing[method]} tokens differ",
                flush=True,
            )


if __name__ == "__main__":
    main()
