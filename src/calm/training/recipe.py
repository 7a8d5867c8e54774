"""What a recipe says: data, autoencoder, language model, and how both are trained.

This file imports neither torch nor transformers: the command line reads it for its help.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from calm.errors import InputError
from calm.models.hyperparameters import (
    AutoencoderHyperparameters,
    DecoderHyperparameters,
    InputHyperparameters,
)

# Settings that do not change what a run makes: it may be resumed with other values of them.
WITHOUT_EFFECT = ("report_to",)


def as_list(names: list[str] | str) -> list[str]:
    """One name or several, always as a list."""
    return [names] if isinstance(names, str) else names


@dataclass(kw_only=True)
class DataSettings:
    """Where the text comes from and how it is cut.

    Args:
        sources: A file, folder (of files, or of save_to_disk) or hub dataset, or a list of them, or a folder
            of `calm prepare`.
        validation_sources: Held-out text; none takes the split "validation" of a saved DatasetDict, or a part
            of the sources.
        validation_fraction: Share of the text held out: of its documents, or of parts of long ones.
        text_field: Field of the text in records; several, such as title,text, are put together.
        separator: Line that parts the documents of a plain-text file ("" for a blank line).
        max_document_mb: Longest document or line in MB (10^6 bytes): they are read into memory whole.
        tokenizer: Folder, tokenizer.json or hub name; none trains a byte-level BPE on the text.
        vocab_size: Size of a trained vocabulary.
        context: Tokens per block, a multiple of the chunk size.
        layout: "documents" aligns each document to chunks, "packed" concatenates them.
        num_proc: Processes for reading and tokenizing; none takes all cores.
        streaming: Read and tokenize while training, for text larger than the disk. A sample is prepared first
            for tokenizer and held-out text.
        sample_documents: Documents of each file or hub dataset in that sample, at most.
        window_documents: Documents of a stream that are shuffled among each other.
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
    num_proc: int | None = None
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
        name: "muon" (Muon on weight matrices, AdamW on the rest), "adamw", or the name of another
            optimizer of the pytorch_optimizer library.
        learning_rate: Peak rate; for muon, that of the weight matrices.
        adamw_learning_rate: For muon, the peak rate of embeddings, norms, biases, and the first and
            last layer of the head.
        weight_decay: Decay of weight matrices.
        beta1: First moment of AdamW.
        beta2: Second moment of AdamW.
        epsilon: Epsilon of AdamW.
        momentum: Momentum of muon.
        newton_schulz_steps: Iterations of muon's orthogonalization.
        schedule: Shape of the rate after warm-up.
        warmup_steps: Steps of linear rise.
        decay_fraction: For "warmup_stable_decay", the share of steps at the end that decay to zero.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        source_rate: Rates of weights that a Transformer brought along as it became a CALM, or a CALM to a new
            head, relative to those of new ones.
        extra: Further arguments of an optimizer named otherwise.
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
    """How long one stage trains, and what it writes on the way.

    Args:
        steps: Optimizer steps.
        batch_tokens: Tokens of an optimizer step, on all processes together: whole blocks for each.
        microbatch_tokens: Tokens that a process works on at once, at most; the gradients of several such
            batches are summed where its share of a step is larger. None for the whole share.
        optimizer: The optimizer and its schedule.
        precision: "fp32", "bf16" for mixed precision, or "auto", which times both when a run begins.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the model with torch.compile.
        log_every: Steps between logged losses.
        evaluate_every: Steps between held-out evaluations; 0 evaluates at the end only.
        evaluation_blocks: Held-out blocks of such an evaluation.
        save_every: Steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: Checkpoints kept.
        num_workers: Data loading processes.
    """

    steps: int = 1000
    batch_tokens: int = 8192
    microbatch_tokens: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 20
    evaluate_every: int = 200
    evaluation_blocks: int = 64
    save_every: int = 200
    keep_checkpoints: int = 2
    num_workers: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.steps * self.batch_tokens

    def batches(self, context: int, num_processes: int = 1) -> tuple[int, int]:
        """Blocks that a process works on at once, and how often it does so in an optimizer step.

        Args:
            context: Tokens of a block.
            num_processes: Processes that share the step.

        Raises:
            InputError: If the step is not a whole number of blocks for each process, or a block is larger
                than what a process may work on at once.
        """
        shared = context * num_processes
        if self.batch_tokens < 1 or self.batch_tokens % shared:
            of_processes = f" x {num_processes} processes" if num_processes > 1 else ""
            raise InputError(
                f"batch_tokens must be a multiple of {shared} (blocks of {context} tokens{of_processes}), "
                f"got {self.batch_tokens}."
            )
        blocks = self.batch_tokens // shared
        most = blocks if self.microbatch_tokens is None else self.microbatch_tokens // context
        if most < 1:
            raise InputError(
                f"microbatch_tokens must be at least the context of {context} tokens, "
                f"got {self.microbatch_tokens}."
            )
        at_once = next(size for size in range(min(most, blocks), 0, -1) if blocks % size == 0)
        return at_once, blocks // at_once


@dataclass(kw_only=True)
class _Trained:
    """What need not be trained.

    Args:
        path: A trained autoencoder folder (or a model folder with one inside) to use; none trains one.
    """

    path: str | None = None


@dataclass(kw_only=True)
class UptrainingSettings:
    """How a Transformer of tokens becomes a CALM, if `init_from` names one (docs/uptraining.md).

    Args:
        first_layers: So many of its first layers read tokens in the head; the backbone has them, too.
        last_layers: So many of its last layers are in the head; the backbone has all others.
        layers: Numbers from 0 on of the layers that are used; none for all.
        sink: Whether each window of the head begins with the source's first token, for attention to rest on.
    """

    first_layers: int = 4
    last_layers: int = 8
    layers: list[int] | None = None
    sink: bool = True


@dataclass(kw_only=True)
class TeacherSettings:
    """A Transformer of tokens whose distributions a model learns (docs/uptraining.md#a-teacher).

    Args:
        model: Its folder or hub name; it has the model's tokenizer. None for no teacher.
        weight: Its share of the loss: weight x temperature^2 x KL(teacher || model) at every token, and
            cross-entropy for the rest. With 0, and no states, it is not loaded.
        temperature: What scores of both are divided by.
        states: What the squared distance of the backbone's states from its own, relative to these, counts in
            the loss; for a CALM that is made of the teacher's layers.
    """

    model: str | None = None
    weight: float = 1.0
    temperature: float = 1.0
    states: float = 0.0

    @property
    def takes_part(self) -> bool:
        """Whether there is a teacher, and the loss depends on it."""
        return self.model is not None and (self.weight > 0 or self.states > 0)


# Settings of the last base come first: in the help, in recipes that are written, and in their digests.
@dataclass(kw_only=True)
class AutoencoderSettings(AutoencoderHyperparameters, _Trained):
    """The chunk autoencoder.

    Args:
        training: How it is trained.
    """

    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(kw_only=True)
class LanguageModelSettings(InputHyperparameters, DecoderHyperparameters):
    """The backbone over chunks and its head; for an autoregressive model, the decoder over tokens.

    Args:
        init_from: Folder or hub name of a model whose weights training begins with; its tokenizer,
            autoencoder, sizes and head are taken as well. A CALM may begin with a Transformer of tokens,
            too. None begins anew.
        new_head: Of the CALM that training begins with, take all but the head and the autoencoder, which are
            the recipe's.
        uptraining: How a Transformer of tokens becomes a CALM.
        teacher: A Transformer of tokens to learn from.
        sharded: With several processes, each keeps a part of weights, gradients and optimizer state (FSDP2)
            instead of all of them (DDP).
        attention: Implementation; "flash_attention_2" and others need their package.
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
    """Everything that decides a run.

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
    report_to: list[str] | str = field(default_factory=list)

    @property
    def tracker_list(self) -> list[str]:
        """The trackers, always as a list, each once."""
        return list(dict.fromkeys(as_list(self.report_to)))

    @property
    def trains_autoencoder(self) -> bool:
        """Whether there is a first stage."""
        return self.model == "calm" and self.autoencoder.path is None and self.autoencoder.kind == "mlp"
