"""How fast is a token written at T = 1, beside a bare loop over the same layers, and beside a Llama?

    python benchmarks/generation.py

Random weights, no end of text, prompts of 32 tokens, in turns. The bare loop is the yardstick of overhead:
the same model's embedding, projection, `LlamaModel` with its cache, head and decoder, one after the other,
without prompts of several lengths, ends, samplers or seeds. The Llama has as many parameters; its `generate`
is that of transformers (temperature 1, no top-k). With --compile, ours is also compiled ahead of time (`calm
compile`), and the Llama's step with a static cache; compiling is not in the times.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import DEVICE, in_turns, machine, ratios
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from calm.models.caches import CACHE
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.generation.ahead import compile_steps
from calm.models.heads import LatentHead

# Width, inner width, layers, heads, vocabulary, width of the autoencoder, latent size.
SIZES = {
    "small": (256, 688, 4, 4, 4096, 128, 64),
    "medium": (512, 1376, 8, 8, 16384, 256, 128),
}


def models(size: str) -> tuple[CalmForCausalLM, LlamaForCausalLM]:
    """A CALM with K = 4 and a Llama with as many parameters, the autoencoder's among them."""
    width, inner, layers, heads, vocabulary, autoencoder, latent = SIZES[size]
    calm = CalmForCausalLM(
        CalmConfig(
            autoencoder_config=CalmAutoencoderConfig(
                vocab_size=vocabulary,
                chunk_size=4,
                latent_size=latent,
                hidden_size=autoencoder,
                intermediate_size=autoencoder * 5 // 2,
            ),
            backbone_config={
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
            },
            head_config={"head_type": "energy", "num_blocks": max(1, layers // 4)},
        )
    )
    torch.nn.init.normal_(calm.head.get_parameter("out.weight"), std=0.2)
    return calm.eval().to(DEVICE), llama_like(calm)


def llama_like(calm: CalmForCausalLM) -> LlamaForCausalLM:
    """A Llama as wide as the CALM's backbone, with more layers until its parameters are as many."""
    backbone = calm.config.backbone
    layers = backbone.num_hidden_layers
    while True:
        config = LlamaConfig(
            vocab_size=calm.config.vocab_size,
            hidden_size=backbone.hidden_size,
            intermediate_size=backbone.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=backbone.num_attention_heads,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
        with torch.device("meta"):
            number = count(LlamaForCausalLM(config))
        if number >= count(calm):
            return LlamaForCausalLM(config).eval().to(DEVICE)
        layers += 1


def random_prompts(calm: CalmForCausalLM, batch: int) -> Tensor:
    """Prompts of 32 tokens, (B, 32)."""
    return torch.randint(4, calm.config.vocab_size, (batch, 32), device=DEVICE)


def writers(
    calm: CalmForCausalLM, llama: LlamaForCausalLM, prompt_BT: Tensor, tokens: int, temperature: float = 1.0
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions by which each model writes, with further arguments of its `generate`.

    Args:
        calm: A CALM.
        llama: A Llama.
        prompt_BT: Prompts.
        tokens: Tokens that each row gets.
        temperature: Of both.
    """
    new: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature}
    shape = (len(prompt_BT), prompt_BT.shape[1] + tokens)

    def by_chunks(**how: Any) -> None:
        text: Any = calm.generate(prompt_BT, seed=0, **new, **how)
        assert text.shape == shape

    def by_tokens(**how: Any) -> None:
        model: Any = llama
        text = model.generate(
            prompt_BT, do_sample=True, top_k=0, use_cache=True, pad_token_id=0, **new, **how
        )
        assert text.shape == shape

    return by_chunks, by_tokens


def count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def bare_loop(calm: CalmForCausalLM, prompt_BT: Tensor, num_chunks: int) -> Tensor:
    """Chunks that a CALM writes with nothing around its layers, (B, chunks · K)."""
    size, cache = calm.config.chunk_size, DynamicCache(config=calm.config.backbone)
    tokens_BT, written, head = prompt_BT, [], calm.head
    assert isinstance(head, LatentHead)
    for _ in range(num_chunks):
        vectors_BCD = calm.projection(
            calm.backbone.embed_tokens(tokens_BT.unflatten(1, (-1, size))).flatten(-2)
        )
        out = calm.backbone(inputs_embeds=vectors_BCD, use_cache=True, **{CACHE: cache})
        latents_1BZ = head.draw_latents(head.prepare(out.last_hidden_state[:, -1]), 1)
        tokens_BT = calm.autoencoder.decode(latents_1BZ[0]).argmax(-1)
        written.append(tokens_BT)
    return torch.cat(written, dim=1)


def compiled(backend: str = "inductor") -> dict[str, Any]:
    """Arguments of `generate` for a compiled step, on a CPU too (transformers: only if asked)."""
    config: Any = CompileConfig(backend=backend)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="add both compiled")
    arguments = parser.parse_args()
    print(machine())
    print(
        "| size | parameters | batch | what writes | tokens/s | of the bare loop | of the baseline |\n"
        "|---|---|---|---|---|---|---|"
    )
    for size in arguments.sizes:
        calm, llama = models(size)
        if arguments.compile and DEVICE == "cpu":
            compile_steps(calm)
        for batch in arguments.batches:
            prompt = random_prompts(calm, batch)
            by_chunks, by_tokens = writers(calm, llama, prompt, arguments.tokens)
            num_chunks = arguments.tokens // calm.config.chunk_size
            ways: dict[str, Callable[[], Any]] = {
                "baseline": by_tokens,
                "bare loop": partial(bare_loop, calm, prompt, num_chunks),
                "CALM": partial(by_chunks, disable_compile=True),
            }
            if arguments.compile:
                ways["baseline, compiled"] = partial(by_tokens, **compiled())
                ways["CALM, compiled"] = partial(by_chunks, **({} if DEVICE == "cpu" else compiled()))
            times = in_turns(ways, arguments.rounds)
            of_bare, of_baseline = ratios(times, "bare loop"), ratios(times, "baseline")
            for name in ways:
                model = llama if name.startswith("baseline") else calm
                print(
                    f"| {size} | {count(model) / 1e6:.1f} M | {batch} | {name} | "
                    f"{batch * arguments.tokens / of_bare[name][0]:,.0f} | {ratio(of_bare[name])} | "
                    f"{ratio(of_baseline[name])} |"
                )


def ratio(row: tuple[float, float, float, float]) -> str:
    """Times as fast as a reference: the median round, the slowest and the quickest."""
    _, median, least, most = row
    return f"{median:.2f} ({least:.2f} to {most:.2f})"


if __name__ == "__main__":
    main()
