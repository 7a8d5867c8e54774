"""How fast is a token written at T = 1, beside a plain Llama with as many parameters?

    python benchmarks/generation.py

Random weights, no end of text, one prompt of 32 tokens; `generate` of each, in turns. The Llama's is that of
transformers, with its cache and the same sampling (temperature 1, no top-k). With --compile both also write
with a static cache and a compiled step; compiling is not in the times.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import in_turns, machine, ratios
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    wanted, deeper = count(calm), layers
    while True:  # More layers until the parameters are as many.
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=deeper,
            num_attention_heads=heads,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
        llama = LlamaForCausalLM(config)
        if count(llama) >= wanted:
            return calm.eval().to(DEVICE), llama.eval().to(DEVICE)
        deeper += 1


def count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def compile_config() -> CompileConfig:
    """How both are compiled, on a CPU too (where transformers does so only if asked)."""
    config: Any = CompileConfig()
    config._compile_all_devices = True
    return config


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="add both with a compiled step")
    arguments = parser.parse_args()
    print(machine())
    print("| size | parameters | batch | model | tokens/s | times as fast |\n|---|---|---|---|---|---|")
    for size in arguments.sizes:
        calm, llama = models(size)
        for batch in arguments.batches:
            prompt = torch.randint(4, 4096, (batch, 32), device=DEVICE)
            new: dict[str, Any] = {"max_new_tokens": arguments.tokens}

            def by_chunks(prompt: Tensor, new: dict[str, Any], calm: CalmForCausalLM, **how: Any) -> None:
                text: Any = calm.generate(prompt, temperature=1.0, seed=0, **new, **how)
                assert text.shape[1] == 32 + arguments.tokens

            def by_tokens(prompt: Tensor, new: dict[str, Any], llama: Any, **how: Any) -> None:
                text = llama.generate(
                    prompt, do_sample=True, top_k=0, use_cache=True, pad_token_id=0, **new, **how
                )
                assert text.shape[1] == 32 + arguments.tokens

            ways: dict[str, Callable[[], None]] = {
                "baseline": partial(by_tokens, prompt, new, llama),
                "CALM": partial(by_chunks, prompt, new, calm),
            }
            if arguments.compile:
                how = {"cache_implementation": "static", "compile_config": compile_config()}
                ways["baseline, compiled"] = partial(by_tokens, prompt, new, llama, **how)
                ways["CALM, compiled"] = partial(by_chunks, prompt, new, calm, **how)
            table = ratios(in_turns(ways, arguments.rounds), "baseline")
            for name, (seconds, ratio, least, most) in table.items():
                model = calm if name.startswith("CALM") else llama
                print(
                    f"| {size} | {count(model) / 1e6:.1f} M | {batch} | {name} | "
                    f"{batch * arguments.tokens / seconds:,.0f} | {ratio:.1f} ({least:.1f} to {most:.1f}) |"
                )


if __name__ == "__main__":
    main()
