"""Engines that generate with a Transformer: `generate` of transformers, and the fastest alternatives.

All but the first and the last run the same `TokenStep`: the decoder with its cache, including the draw of the
next token from a uniform number, so that each token is one call. It calls the Llama's own modules; the
engines differ in what compiles it:

    compiled           torch's AOTInductor, weights frozen, with separate code for a single row, as `calm
                       compile` does for a CALM; the cache is written in place, and only its used part is read
    ONNX Runtime       the step exported by `torch.onnx`, keys and values passed on by IO binding
                       (pip install onnxruntime onnx onnxscript)
    OpenVINO           the step converted from torch, keys and values as its state (pip install openvino)
    onnxruntime-genai  with its own export, loop and sampling (pip install onnxruntime-genai onnx-ir)

`calm` needs none of these packages. Shapes: R rows, T tokens read at once, P tokens before them, C slots of a
cache, G query heads, H heads of keys and values, d head size, D hidden size.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from calm.models.generation.compiled_files import load_function
from calm.models.generation.tracing import Traced, compile_function
from calm.models.heads.logits import draw_tokens

GREEDY = 1e5
"""An inverse temperature so high that the likeliest token is drawn, whatever the random number."""
MOST_ROWS = 32
"""Maximum batch size of onnxruntime-genai."""
_CACHE_STEP = 64  # Slots by which a cache grows.


class Engine(Protocol):
    """Generates text with a Llama."""

    def write(self, prompt_RT: Tensor, num_tokens: int, inverse_temperature: float = 1.0) -> Tensor:
        """Generate `num_tokens` new tokens per row, (R, new); end-of-text tokens do not end a row."""


class Generate:
    """`generate` of transformers, without any warper of the distribution.

    Args:
        llama: The model.
    """

    def __init__(self, llama: LlamaForCausalLM) -> None:
        self._llama: Any = llama

    def write(self, prompt_RT: Tensor, num_tokens: int, inverse_temperature: float = 1.0) -> Tensor:
        """See `Engine`."""
        sampling = _sampling_options(inverse_temperature)
        text_RT: Tensor = self._llama.generate(
            prompt_RT,
            attention_mask=torch.ones_like(prompt_RT),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            temperature=1.0,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            **sampling,
        )
        return text_RT[:, prompt_RT.shape[1] :]


def _sampling_options(inverse_temperature: float) -> dict[str, Any]:
    return {"do_sample": False} if inverse_temperature == GREEDY else {"do_sample": True, "top_k": 0}


class TokenStep(nn.Module):
    """Reads some tokens, and draws the token after them.

    Args:
        llama: The model.
        is_in_place: Whether keys and values are written into the slots of a cache; else they are appended.
    """

    def __init__(self, llama: LlamaForCausalLM, is_in_place: bool) -> None:
        super().__init__()
        self.llama, self.is_in_place = llama, is_in_place
        self._head_size = llama.model.layers[0].self_attn.head_dim

    def forward(
        self, ids_RT: Tensor, first: Tensor, uniform_R: Tensor, inverse_temperature: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        """The next tokens (R, 1), and the cache where it is not written in place.

        Args:
            ids_RT: Tokens to read.
            first: Position of the first of them, (1,).
            uniform_R: Uniform random numbers from which the next tokens are drawn.
            inverse_temperature: Factor on the logits, (1,).
            *cache: Keys and values of each layer in turn: (R, H, C, d) if in place, else (R, H, P, d).
        """
        model = self.llama.model
        position_T = first + torch.arange(ids_RT.shape[1])
        angles_Th = position_T.unsqueeze(-1) * model.rotary_emb.inv_freq
        angles_Td = torch.cat([angles_Th, angles_Th], dim=-1)
        rotation = angles_Td.cos(), angles_Td.sin()
        x_RTD, new_cache = model.embed_tokens(ids_RT), []
        for layer, keys, values in zip(model.layers, cache[::2], cache[1::2], strict=True):
            attention = layer.self_attn
            normed_RTD = layer.input_layernorm(x_RTD)
            query_RGTd = _rotate(self._heads(attention.q_proj(normed_RTD)), *rotation)
            key_RHTd = _rotate(self._heads(attention.k_proj(normed_RTD)), *rotation)
            value_RHTd = self._heads(attention.v_proj(normed_RTD))
            attend = self._attend_in_place if self.is_in_place else self._attend_appended
            mixed_RGTd, layer_cache = attend(query_RGTd, key_RHTd, value_RHTd, keys, values, position_T)
            new_cache += layer_cache
            x_RTD = x_RTD + attention.o_proj(mixed_RGTd.transpose(1, 2).flatten(-2))
            x_RTD = x_RTD + layer.mlp(layer.post_attention_layernorm(x_RTD))
        vectors_RD = model.norm(x_RTD[:, -1]) * inverse_temperature
        return draw_tokens(vectors_RD, self.llama.lm_head.weight, uniform_R)[0].unsqueeze(-1), *new_cache

    def _heads(self, projected_RTX: Tensor) -> Tensor:
        return projected_RTX.unflatten(-1, (-1, self._head_size)).transpose(1, 2)

    def _attend_in_place(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position_T: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        keys.index_copy_(2, position_T, key)
        values.index_copy_(2, position_T, value)
        is_seen_TC = torch.arange(keys.shape[2]) <= position_T.unsqueeze(-1)
        # For one row, fused loops beat a kernel made for many queries, as in calm.models.generation.lean.
        if query.shape[0] == 1:
            scores_HC = (query[0] * query.shape[-1] ** -0.5 * keys[0]).sum(-1)
            weights_HC = scores_HC.masked_fill(~is_seen_TC, -torch.inf).softmax(-1)
            return (weights_HC.unsqueeze(-1) * values[0]).sum(1)[None, :, None], []
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=is_seen_TC), []

    def _attend_appended(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, position_T: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        is_seen_TC = torch.arange(keys.shape[2]) <= position_T.unsqueeze(-1)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=is_seen_TC), [keys, values]


def _rotate(x_RHTd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    first, second = x_RHTd.chunk(2, dim=-1)
    return x_RHTd * cos_Td + torch.cat([-second, first], dim=-1) * sin_Td


class Compiled:
    """`TokenStep` as native code.

    Args:
        llama: The model.
        folder: Where compiled code is kept.
        rows: Batch size; code is compiled for 1, or for any larger number.
    """

    def __init__(self, llama: LlamaForCausalLM, folder: Path, rows: int) -> None:
        self._llama = llama
        file = folder / f"token-{'one' if rows == 1 else 'many'}.pt2"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            compile_function(_traced(llama, rows), file)
        self._step = load_function(file)

    @torch.no_grad()
    def write(self, prompt_RT: Tensor, num_tokens: int, inverse_temperature: float = 1.0) -> Tensor:
        """See `Engine`."""
        uniform_NR = torch.rand(num_tokens, len(prompt_RT))
        scale, length = torch.tensor([inverse_temperature]), prompt_RT.shape[1]
        out: Any = self._llama.model(prompt_RT, past_key_values=DynamicCache(config=self._llama.config))
        vectors_RD = out.last_hidden_state[:, -1] * inverse_temperature
        token_R, _ = draw_tokens(vectors_RD, self._llama.lm_head.weight, uniform_NR[0])
        slots = [states for layer in out.past_key_values.layers for states in (layer.keys, layer.values)]
        written, width = [token_R.unsqueeze(-1)], length
        for index in range(1, num_tokens):
            first = length + index - 1
            if first >= width:  # Grown in steps by copying: the compiled code needs contiguous caches.
                more = _CACHE_STEP - width % _CACHE_STEP
                slots, width = [F.pad(states, (0, 0, 0, more)) for states in slots], width + more
            written += self._step(written[-1], torch.tensor([first]), uniform_NR[index], scale, *slots)
        return torch.cat(written, dim=1)


def _traced(llama: LlamaForCausalLM, rows: int) -> Traced:
    rows = 1 if rows == 1 else 8
    config: Any = llama.config
    cache = [
        torch.randn(rows, config.num_key_value_heads, _CACHE_STEP, llama.model.layers[0].self_attn.head_dim)
        for _ in range(2 * len(llama.model.layers))
    ]
    arguments = torch.ones(rows, 1, dtype=torch.long), torch.tensor([9]), torch.rand(rows), torch.ones(1)
    slots, many = torch.export.Dim("slots", min=2, max=2**20), torch.export.Dim("rows", min=2, max=2**16)
    of_rows = {} if rows == 1 else {0: many}
    of_cache = {2: slots} if rows == 1 else {0: many, 2: slots}
    dynamic: tuple[Any, ...] = (of_rows, {}, of_rows, {}, (of_cache,) * len(cache))
    return Traced(TokenStep(llama, is_in_place=True), (*arguments, *cache), dynamic, is_small=rows == 1)


class OnnxRuntime:
    """`TokenStep` in ONNX Runtime.

    Args:
        llama: The model.
        folder: Where the exported model is kept.
    """

    def __init__(self, llama: LlamaForCausalLM, folder: Path) -> None:
        import onnxruntime  # noqa: PLC0415 (optional)

        file = folder / "token.onnx"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                torch.onnx.export(exported_step(llama), f=str(file), dynamo=True, external_data=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._config: Any = llama.config

    def write(self, prompt_RT: Tensor, num_tokens: int, inverse_temperature: float = 1.0) -> Tensor:
        """See `Engine`."""
        rows, config = len(prompt_RT), self._config
        uniform_NR = np.random.random((num_tokens, rows)).astype(np.float32)
        scale = self._value(np.array([inverse_temperature], np.float32))
        empty = np.zeros((rows, config.num_key_value_heads, 0, config.head_dim), np.float32)
        inputs = [node.name for node in self._session.get_inputs()]
        outputs = [node.name for node in self._session.get_outputs()]
        ids, cache = self._value(prompt_RT.numpy()), [self._value(empty)] * (2 * config.num_hidden_layers)
        written, first = [], 0
        for uniform_R in uniform_NR:
            binding = self._session.io_binding()
            values = ids, self._value(np.array([first])), self._value(uniform_R), scale, *cache
            for name, value in zip(inputs, values, strict=True):
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            first += ids.shape()[1]
            ids, *cache = binding.get_outputs()
            written.append(ids.numpy())
        return torch.from_numpy(np.concatenate(written, axis=1))


class OpenVino:
    """`TokenStep` in OpenVINO, with the cache as its state.

    Args:
        llama: The model.
    """

    def __init__(self, llama: LlamaForCausalLM) -> None:
        import openvino  # noqa: PLC0415 (optional)
        from openvino._offline_transformations import (  # noqa: PLC0415
            apply_make_stateful_transformation,
        )

        self._openvino: Any = openvino
        self._config: Any = llama.config
        with torch.no_grad():
            model = openvino.convert_model(exported_step(llama))
        size = 2 * llama.config.num_hidden_layers
        for index, (before, after) in enumerate(
            zip(model.inputs[-size:], model.outputs[-size:], strict=True)
        ):
            before.tensor.set_names({f"before{index}"})
            after.tensor.set_names({f"after{index}"})
        apply_make_stateful_transformation(
            model, {f"before{index}": f"after{index}" for index in range(size)}
        )
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def write(self, prompt_RT: Tensor, num_tokens: int, inverse_temperature: float = 1.0) -> Tensor:
        """See `Engine`."""
        rows, config, request = len(prompt_RT), self._config, self._request
        uniform_NR = np.random.random((num_tokens, rows)).astype(np.float32)
        scale, ids, first = np.array([inverse_temperature], np.float32), prompt_RT.numpy(), 0
        empty = np.zeros((rows, config.num_key_value_heads, 0, config.head_dim), np.float32)
        request.reset_state()
        for state in request.query_state():
            state.state = self._openvino.Tensor(empty)
        written = []
        for uniform_R in uniform_NR:
            request.infer([ids, np.array([first]), uniform_R, scale], share_inputs=True)
            first += ids.shape[1]
            ids = request.get_output_tensor(0).data.copy()
            written.append(ids)
        return torch.from_numpy(np.concatenate(written, axis=1))


def exported_step(llama: LlamaForCausalLM) -> torch.export.ExportedProgram:
    """`TokenStep`, exported for any number of rows, of tokens to read, and of tokens before them."""
    config: Any = llama.config
    dim = torch.export.Dim
    past = [
        torch.randn(2, config.num_key_value_heads, 5, config.head_dim)
        for _ in range(2 * config.num_hidden_layers)
    ]
    arguments = torch.ones(2, 3, dtype=torch.long), torch.tensor([5]), torch.rand(2), torch.ones(1)
    rows, tokens, before = dim("rows", max=2**16), dim("tokens", max=2**20), dim("before", max=2**20)
    dynamic: tuple[Any, ...] = {0: rows, 1: tokens}, {}, {0: rows}, {}, ({0: rows, 2: before},) * len(past)
    step = TokenStep(llama, is_in_place=False)
    return torch.export.export(step, (*arguments, *past), dynamic_shapes=dynamic)


class OnnxGenai:
    """onnxruntime-genai: its own export of the model, with the cache in place, and its own loop and sampling.

    Args:
        folder: Folder of the Llama and its tokenizer.
        exported: Folder of the exported model, which is made if it is missing.
    """

    def __init__(self, folder: Path, exported: Path) -> None:
        import onnxruntime_genai  # noqa: PLC0415 (optional)

        self._genai: Any = onnxruntime_genai
        if not (exported / "genai_config.json").is_file():
            builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
            subprocess.run([*builder, "-i", folder, "-o", exported, "-c", exported / "cache"], check=True)
        config = self._genai.Config(str(exported))
        config.overlay(json.dumps({"model": {"eos_token_id": 0, "pad_token_id": 0}}))
        self._model = self._genai.Model(config)

    def write(self, prompt_RT: Tensor, num_tokens: int, inverse_temperature: float = 1.0) -> Tensor:
        """See `Engine`."""
        rows, length = prompt_RT.shape
        params = self._genai.GeneratorParams(self._model)
        # Only the padding token ends a text, and not even that one before its length is reached.
        lengths = {"min_length": length + num_tokens, "max_length": length + num_tokens}
        params.set_search_options(batch_size=rows, **lengths, **_sampling_options(inverse_temperature))
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(prompt_RT.numpy().astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        text = np.stack([generator.get_sequence(row) for row in range(rows)])
        return torch.from_numpy(text[:, length:].astype(np.int64))
