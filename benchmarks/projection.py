"""How long does it take to find the most likely tokens of decoder outputs?

    python benchmarks/projection.py                 # 128,256 tokens of 512, with and without structure
    python benchmarks/projection.py runs/demo/model # the embeddings and decoder outputs of a model

Compared, in turns within one run: all scores and their argmax (the obvious way), and slices of the
vocabulary with a running maximum. "Structure" gives random embeddings the spectrum that the demo's
trained ones have (77% of the energy in a 16th of the directions, 84% in an eighth, 90% in a quarter, 95% in
a half). Tokens that differ from the obvious way are counted.
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
    """All scores at once."""
    return (vectors @ weight.T).argmax(-1)


def structured(size: int, width: int, generator: torch.Generator) -> Tensor:
    """Random embeddings with the spectrum of trained ones."""
    energy = torch.empty(width)
    borders = [0, width // 16, width // 8, width // 4, width // 2, width]
    for share, low, high in zip((0.77, 0.07, 0.06, 0.05, 0.05), borders, borders[1:], strict=False):
        energy[low:high] = share / (high - low)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (torch.randn(size, width, generator=generator) * energy.sqrt()) @ turn


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
    found = {}
    for name, weight in (
        ("no structure", torch.randn(size, width, generator=generator) / width**0.5),
        ("structure", structured(size, width, generator)),
    ):
        for num_vectors in (64, 800):  # 16 and 200 draws of chunks of 4.
            true = torch.randint(size, (num_vectors,), generator=generator)
            noise = torch.randn(num_vectors, width, generator=generator)
            # A decoder points at its token; the noise is about as long as the embedding.
            vectors = weight[true] + noise * weight[true].norm(dim=1, keepdim=True) / width**0.5
            found[f"{name}, {num_vectors} vectors"] = (vectors, weight)
    return found


@torch.no_grad()
def main() -> None:
    """Time all ways on all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name, (vectors, weight) in cases(arguments.folder).items():
        ways = {"slices": lambda v, w=weight: argmax_of_logits(v, w)}
        ways["obvious"] = lambda v, w=weight: obvious(v, w)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        wrong: dict[str, int] = {}
        expected = obvious(vectors, weight)
        for _ in range(arguments.rounds):
            for way, run in ways.items():
                start = time.perf_counter()
                tokens = run(vectors)
                seconds[way].append(time.perf_counter() - start)
                wrong[way] = int((tokens != expected).sum())
        for way, values in seconds.items():
            ratios = [a / b for a, b in zip(seconds["obvious"], values, strict=True)]
            print(
                f"{name}  {way:10s}: {1e3 * statistics.median(values):8.1f} ms, "
                f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) the speed of "
                f"the obvious way, {wrong[way]} tokens differ",
                flush=True,
            )


if __name__ == "__main__":
    main()
