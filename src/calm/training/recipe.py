"""The fields of a recipe: data, autoencoder, language model, and how both are trained.

This file imports neither torch nor transformers: the command line reads it for its help.
"""

from dataclasses import Field, dataclass, field
from typing import Any, Literal

from calm.errors import InputError
from calm.models.hyperparameters import (
    AutoencoderHyperparameters,
    DecoderHyperparameters,
    InputHyperparameters,
)

# How a setting affects the result. A run may be resumed with other values of settings that do not, and with a
# warning of those that change its rounding.
Effect = Literal["none", "rounding", "full"]


def _with_effect(effect: Effect, with_streams: Effect | None = None) -> dict[str, Effect]:
    """Metadata of a setting whose effect is not "full", or not unless text is streamed."""
    return {"effect": effect, "effect_with_streams": with_streams or effect}


WITHOUT_EFFECT = _with_effect("none")


def effect_of(setting: Field, recipe: Any) -> Effect:
    """The effect of a field of a recipe, or of a group of its settings, on the recipe's result."""
    is_streaming = isinstance(recipe, Recipe) and recipe.data.streaming
    effect: Effect = setting.metadata.get("effect_with_streams" if is_streaming else "effect", "full")
    return effect


def as_list(names: list[str] | str) -> list[str]:
    """One name or several, always as a list."""
    return [names] if isinstance(names, str) else names


@dataclass(kw_only=True)
class DataSettings:
    """Where the text comes from and how it is cut.

    Args:
        sources: A file, folder (of files, or from save_to_disk) or hub dataset, or a list of them; or a
            folder written by `calm prepare`.
        validation_sources: Held-out text; none takes the "validation" split of a saved DatasetDict, or a part
            of the sources.
        validation_fraction: Share of the text to hold out, as documents or as parts of long ones.
        text_field: Field of records that holds the text; several, such as title,text, are joined.
        separator: Line that separates the documents of a plain-text file ("" for a blank line).
        max_document_mb: Longest document or line in MB (10^6 bytes), each of which is read into memory whole.
        tokenizer: Folder, tokenizer.json, run, shipped model or hub name; none trains a byte-level BPE on the
            text.
        vocab_size: Vocabulary size of a trained tokenizer.
        context: Tokens per block, a multiple of the chunk size.
        layout: "documents" aligns each document to chunks, "packed" concatenates them.
        num_proc: Processes for reading and tokenizing; none takes all cores.
        streaming: Read and tokenize while training, for text larger than the disk. A sample is prepared
            first, for the tokenizer and the held-out text.
        sample_documents: Maximum number of documents from each file or hub dataset in that sample.
        window_documents: Documents per shuffling window of a stream.
    """

    sources: list[str] | str = field(default_factory=list)
    validation_sources: list[str] | str | None = None
    validation_fraction: float = 0.02
    text_field: list[str] | str = "text"
    separator: str | None = None
    max_document_mb: int = 1000
    tokenizer: str | None = None
    vocab_size: int = 4096
    context: int = 1024
    layout: Literal["documents", "packed"] = "documents"
    num_proc: int | None = field(default=None, metadata=WITHOUT_EFFECT)
    streaming: bool = False
    sample_documents: int = 10_000
    window_documents: int = 1000

    @property
    def source_list(self) -> list[str]:
        """The sources, always as a list."""
        return as_list(self.sources)

    @property
    def validation_source_list(self) -> list[str]:
        """The held-out sources, always as a list; empty if a part of the sources is held out."""
        return as_list(self.validation_sources or [])


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimizer and its schedule.

    Args:
        name: "muon" (Muon on weight matrices, AdamW on the rest), "adamw", a registered optimizer, or one
            of the pytorch_optimizer library.
        learning_rate: Peak learning rate; for muon, that of the weight matrices.
        adamw_learning_rate: For muon, the peak learning rate of embeddings, norms, biases, and the first and
            last layer of the head.
        weight_decay: Weight decay of matrices.
        beta1: Decay rate of AdamW's first moment.
        beta2: Decay rate of AdamW's second moment.
        epsilon: Epsilon of AdamW.
        momentum: Momentum of muon.
        newton_schulz_steps: Iterations of muon's orthogonalization.
        schedule: Learning-rate schedule after warm-up.
        warmup_steps: Steps of linear warm-up.
        decay_fraction: For "warmup_stable_decay", the share of steps at the end that decay to zero.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        source_rate: Learning rate of pretrained weights relative to that of new ones, in a Transformer
            converted to a CALM, or in a CALM with a new head.
        extra: Further arguments of optimizers other than muon and adamw.
    """

    name: str = "muon"
    learning_rate: float = 2e-2
    adamw_learning_rate: float = 2e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "constant"
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    max_grad_norm: float = 1.0
    source_rate: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainingSettings:
    """How one stage trains, and what it logs and saves.

    Args:
        steps: Optimizer steps.
        batch_tokens: Tokens per optimizer step over all processes: whole blocks for each.
        microbatch_tokens: Most tokens that a process works on at once; if its share of a step is larger, it
            accumulates gradients. None for the whole share.
        optimizer: The optimizer and its schedule.
        precision: "fp32", "bf16" for mixed precision, or "auto", which takes what is faster on the device.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with torch.compile.
        log_every: Steps between logged losses.
        evaluate_every: Steps between held-out evaluations; 0 evaluates only at the end.
        evaluation_blocks: Held-out blocks per evaluation.
        save_every: Steps between checkpoints; 0 saves only at the end.
        keep_checkpoints: Number of checkpoints to keep.
        num_workers: Data-loading workers of each process; 0 loads in the process itself.
    """

    steps: int = 1000
    batch_tokens: int = 8192
    microbatch_tokens: int | None = field(default=None, metadata=_with_effect("rounding", "full"))
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = field(default=20, metadata=WITHOUT_EFFECT)
    evaluate_every: int = 200
    evaluation_blocks: int = 64
    save_every: int = field(default=200, metadata=WITHOUT_EFFECT)
    keep_checkpoints: int = field(default=2, metadata=WITHOUT_EFFECT)
    num_workers: int = field(default=0, metadata=_with_effect("none", "full"))

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.steps * self.batch_tokens

    def batches(self, context: int, num_processes: int = 1) -> tuple[int, int]:
        """Blocks per microbatch of a process, and its microbatches per optimizer step.

        Args:
            context: Tokens per block.
            num_processes: Processes that share the step.

        Raises:
            InputError: If the step is not a whole number of blocks for each process, or a block is larger
                than `microbatch_tokens`.
        """
        unit = context * num_processes
        if self.batch_tokens < 1 or self.batch_tokens % unit:
            times = f" x {num_processes} processes" if num_processes > 1 else ""
            raise InputError(
                f"batch_tokens must be a multiple of {unit} (blocks of {context} tokens{times}), "
                f"got {self.batch_tokens}."
            )
        blocks = self.batch_tokens // unit
        limit = blocks if self.microbatch_tokens is None else self.microbatch_tokens // context
        if limit < 1:
            raise InputError(
                f"microbatch_tokens must be at least the context of {context} tokens, "
                f"got {self.microbatch_tokens}."
            )
        microbatch = next(size for size in range(min(limit, blocks), 0, -1) if blocks % size == 0)
        return microbatch, blocks // microbatch


@dataclass(kw_only=True)
class _Pretrained:
    """A part that need not be trained.

    Args:
        path: Folder of a trained autoencoder (or a model folder with one inside) to use; none trains one.
    """

    path: str | None = None


@dataclass(kw_only=True)
class UptrainingSettings:
    """How a token-level Transformer becomes a CALM, if `init_from` names one (docs/uptraining.md).

    Args:
        first_layers: How many of its first layers are copied to the head, to read tokens there; the backbone
            has them as well.
        last_layers: How many of its last layers go to the head; the backbone has all others.
        layers: Indices of the layers to use, from 0; none for all.
        sink: Whether each window of the head starts with the source's first token, as an attention sink.
    """

    first_layers: int = 4
    last_layers: int = 8
    layers: list[int] | None = None
    sink: bool = True


@dataclass(kw_only=True)
class TeacherSettings:
    """A token-level Transformer whose distributions a model learns (docs/uptraining.md#a-teacher).

    Args:
        model: Folder or hub name of the teacher, whose tokenizer must be the model's. None for no teacher.
        weight: Its share of the loss: weight x temperature^2 x KL(teacher || model) at every token, and
            cross-entropy for the rest. With 0, and `states` 0, it is not loaded.
        temperature: The logits of both are divided by this.
        states: Weight in the loss of the squared distance between the backbone's states and the teacher's,
            relative to the latter; for a CALM that is made of the teacher's layers.
    """

    model: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    states: float = 0.0

    @property
    def is_used(self) -> bool:
        """Whether there is a teacher and the loss depends on it."""
        return self.model is not None and (self.weight > 0 or self.states > 0)


# Fields of the last base class come first: in the help, in recipes that are written, and in their digests.
@dataclass(kw_only=True)
class AutoencoderSettings(AutoencoderHyperparameters, _Pretrained):
    """The chunk autoencoder.

    Args:
        training: How it is trained.
    """

    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(kw_only=True)
class LanguageModelSettings(InputHyperparameters, DecoderHyperparameters):
    """The backbone over chunks and its head; for an autoregressive model, the decoder over tokens.

    Args:
        init_from: Folder or hub name of a model whose weights training starts from; its tokenizer,
            autoencoder, sizes and head are used as well. A CALM may also start from a token-level
            Transformer. None starts from scratch.
        new_head: Keep all of the CALM that training starts from, except the head and the autoencoder, which
            come from the recipe.
        uptraining: How a token-level Transformer becomes a CALM.
        teacher: A token-level Transformer to learn from.
        sharded: With several processes, each keeps a shard of weights, gradients and optimizer state (FSDP2)
            instead of all of them (DDP).
        attention: Attention implementation; "flash_attention_2" and others need their package.
        head: The head: `head_type` and its own fields (see calm.models.heads); unused by an
            autoregressive model.
        training: How it is trained.
    """

    init_from: str | None = None
    new_head: bool = False
    uptraining: UptrainingSettings = field(default_factory=UptrainingSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    sharded: bool = False
    attention: str = "sdpa"
    head: dict[str, Any] = field(default_factory=lambda: {"head_type": "energy"})
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(kw_only=True)
class Recipe:
    """Everything that defines a run.

    Args:
        seed: Seed of all randomness.
        model: "calm", or "autoregressive" for the baseline: a Llama that predicts token after token,
            trained without the autoencoder stage.
        chunk_size: Tokens per chunk K; 1 for an autoregressive model.
        data: Where the text comes from and how it is cut.
        autoencoder: The chunk autoencoder; unused by an autoregressive model.
        language_model: The backbone over chunks and its head.
        report_to: Trackers of losses and scores: any of tensorboard, wandb, mlflow and trackio.
    """

    seed: int = 0
    model: Literal["calm", "autoregressive"] = "calm"
    chunk_size: int = 4
    data: DataSettings = field(default_factory=DataSettings)
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    language_model: LanguageModelSettings = field(default_factory=LanguageModelSettings)
    report_to: list[str] | str = field(default_factory=list, metadata=WITHOUT_EFFECT)

    @property
    def tracker_list(self) -> list[str]:
        """The trackers, always as a list, without duplicates."""
        return list(dict.fromkeys(as_list(self.report_to)))

    @property
    def trains_autoencoder(self) -> bool:
        """Whether the run has an autoencoder stage."""
        return self.model == "calm" and self.autoencoder.path is None and self.autoencoder.kind == "mlp"
