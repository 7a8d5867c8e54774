"""The Hugging Face Trainer with our optimizers, our held-out scores and checkpoints written whole."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from calm.data.streaming import PLACE, BlockStream
from calm.errors import InputError, RunError, Terminated, reason_of
from calm.models.autoencoder import CalmAutoencoder
from calm.models.calm import CalmForCausalLM
from calm.storage.checksums import write_checksums
from calm.storage.disk import disk_errors
from calm.training.checkpoints import checkpoints_in, newest_whole_checkpoint
from calm.training.collating import NUMBERS, collate_chunks, collate_stream, collate_tokens, count_tokens
from calm.training.faults import LeaveOnSignal, LossWatch, check_weights
from calm.training.inputs import copy_inputs, other_input
from calm.training.noise import generators_of_blocks
from calm.training.optimizers import build_optimizer, build_scheduler
from calm.training.processes import processes
from calm.training.progress import ProgressLines
from calm.training.recipe import TrainingSettings
from calm.training.sharding import (
    check_checkpoint,
    keep_autocast,
    shard_on_cpu_as_well,
    sharding_arguments,
    whole_copy,
)
from calm.training.speed import Speed, known_training_flops

Score = Callable[[PreTrainedModel, datasets.Dataset], dict[str, float]]


class ChunkTrainer(Trainer):
    """Trains the autoencoder or a language model on blocks.

    Args:
        model: The model.
        blocks: Training blocks of `calm.data.chunking`, or a stream of them.
        held_out: Held-out blocks.
        score: Evaluation on the held-out blocks; its figures are logged.
        settings: The stage's part of a recipe.
        output: Folder of checkpoints and logs.
        tokenizer: Saved with each checkpoint.
        context: Tokens of a block.
        seed: Seed of data order and training noise.
        sharded: Whether each process keeps a part of the model only, where there are several.
        adapted: The `peft.PeftModel` around the model, if adapters are trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: datasets.Dataset | BlockStream,
        held_out: datasets.Dataset,
        score: Score,
        settings: TrainingSettings,
        output: Path,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        seed: int,
        sharded: bool = False,
        adapted: Any = None,
    ) -> None:
        self.score = score
        self.settings = settings
        self._network, self._output, self._context = model, output, context
        self._is_sharded = sharded and processes().num_processes > 1
        self._stream = blocks if isinstance(blocks, BlockStream) else None
        self._staging: Path | None = None
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        is_of_chunks = isinstance(model, CalmForCausalLM | CalmAutoencoder)
        self._count: Any = model.count_targets if is_of_chunks else count_tokens
        super().__init__(
            model=adapted if adapted is not None else model,
            args=_arguments(
                settings, context, output, seed, self._stream is not None, model if self._is_sharded else None
            ),
            train_dataset=blocks,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=collate_chunks if is_of_chunks else collate_tokens,
        )
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressLines)
        self._speed = Speed(
            settings.batch_tokens // self.args.world_size,
            known_training_flops(model.config, context),
            self.args.device,
            torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        )
        self.add_callback(self._speed)
        self._watch = LossWatch(self.args.device)
        self._signals = LeaveOnSignal()
        self.add_callback(self._signals)

    def train_or_resume(self) -> None:
        """Train from the last whole checkpoint, or from the start; end with a held-out evaluation.

        Raises:
            InputError: If the checkpoint is sharded and the run is not, or the other way round, or no
                checkpoint is whole.
            RunError: If the loss is not finite, a process that loads data dies, or the disk is full.
            Terminated: If the run was asked to end by SIGTERM; it has written a checkpoint.
        """
        self._output.mkdir(parents=True, exist_ok=True)
        checkpoint = newest_whole_checkpoint(self._output)
        if checkpoint:
            check_checkpoint(checkpoint, self._is_sharded)
            if (what := other_input(self._output, checkpoint)) is not None:
                raise InputError(
                    f"'{checkpoint}' is of another run: {what} is not the same. Put back those of this run."
                )
        if checkpoint and self._stream is not None:
            self._stream.position.load(checkpoint / self._position_file)
        try:
            with self._signals.listening():
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(f"{reason_of(error)} Set num_workers lower or to 0; {self._left()}.") from error
        if self._signals.left:
            raise Terminated(f"asked to end after step {self.state.global_step}; {self._left()}.")
        if not self.settings.evaluate_every:
            self.evaluate()

    def whole_network(self) -> PreTrainedModel:
        """The model with all weights: itself, or a copy where each process has a part of them."""
        return whole_copy(self._network)

    @property
    def _position_file(self) -> str:
        return f"position_{processes().process_index}.json"

    def get_train_dataloader(self) -> DataLoader:
        """Batches; those of a stream come as they are, for it knows what other processes read."""
        if self._stream is None:
            return super().get_train_dataloader()
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=partial(collate_stream, collate=collate),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """A random order of whole steps: what does not fill one is left for another epoch.

        So a step has as many tokens at the end of an epoch as elsewhere, however many processes share it.
        """
        blocks: Any = train_dataset if train_dataset is not None else self.train_dataset
        step = self.settings.batch_tokens // self._context
        return RandomSampler(blocks, num_samples=max(1, len(blocks) // step) * step)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One batch; the first loss that is not finite is remembered."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch.see(loss, self.state.global_step + 1)
        return loss

    def _left(self) -> str:
        """What is left of the run if it ends now."""
        checkpoints = checkpoints_in(self._output)
        return f"--resume goes on from '{checkpoints[-1]}'" if checkpoints else "there is no checkpoint yet"

    def create_accelerator_and_postprocess(self) -> None:
        """What places the model on its device and shares it among processes."""
        super().create_accelerator_and_postprocess()
        if self._is_sharded:
            keep_autocast(self.accelerator)

    def compute_loss_context_manager(self) -> Any:
        """What a loss is computed in: accelerate puts autocast around models, but not around sharded ones."""
        if not self._is_sharded or self.settings.precision != "bf16":
            return super().compute_loss_context_manager()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the recipe names."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or self._network, self.settings.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule that the recipe names."""
        if self.lr_scheduler is None:
            chosen = optimizer or self.create_optimizer()
            schedule: Any = build_scheduler(chosen, self.settings.optimizer, num_training_steps)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures; with a training loss, how fast training runs as well."""
        if "loss" in logs:
            self._watch.check(self._left())
            logs |= self._speed.read(self.state.global_step)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the model on held-out text and log the figures."""
        was_training = self._network.training
        self._network.eval()
        with self._speed.pause():
            scores = self.score(self.whole_network(), self.eval_dataset)
        self._network.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, with noise that the seed, the step and each block decide."""
        place = inputs.pop(PLACE, None)
        if place is not None and self._stream is not None:
            self._stream.position.note(*place.tolist())
        numbers = inputs.pop(NUMBERS, None)
        if numbers is not None:
            step, device = self.state.global_step, inputs["input_ids"].device
            generators = generators_of_blocks(self.args.seed, step, numbers.tolist(), device)
            draw: Any = self._network.draw_training_noise
            inputs["noise"] = draw(generators, **inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor | int | None:
        """Targets of an optimizer step on all processes: the loss is a mean over them."""
        if not batch_samples:
            return None
        counts = [self._count(batch["labels"], batch.get("position_ids")) for batch in batch_samples]
        count = torch.stack(counts).sum(0).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count)
        return count.clamp_min(1)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside the others and move it in place when it is complete.

        A run killed while it writes leaves no checkpoint that looks whole and is not.
        """
        self._watch.check(self._left())
        check_weights(self._network, self.state.global_step, self._left())
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run_dir / ".partial"
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        processes().wait_for_everyone()
        with self._speed.pause(), disk_errors(run_dir / name, self._left()):
            try:
                super()._save_checkpoint(model, trial)
                if self._stream is not None:
                    self._stream.position.save(self._staging / name / self._position_file)
            except BaseException:
                if self.args.should_save:
                    shutil.rmtree(self._staging, ignore_errors=True)
                raise
            finally:
                staging, self._staging = self._staging, None
            processes().wait_for_everyone()  # Each process writes a part.
            if self.args.should_save:
                copy_inputs(self._output, staging / name)
                write_checksums(staging / name)
                _sync(staging / name)
                (staging / name).rename(run_dir / name)
                # Old ones are moved away before they are deleted: a kill meanwhile leaves no half of one.
                for old in checkpoints_in(run_dir)[: -max(1, self.settings.keep_checkpoints)]:
                    old.rename(staging / old.name)
                shutil.rmtree(staging)
            processes().wait_for_everyone()


def _arguments(
    settings: TrainingSettings,
    context: int,
    output: Path,
    seed: int,
    is_stream: bool,
    sharded: PreTrainedModel | None,
) -> TrainingArguments:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    blocks, accumulation = settings.batches(context, processes().num_processes)
    steps = settings.steps
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=blocks,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=settings.optimizer.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=settings.precision == "bf16",
        torch_compile=settings.compile,
        ignore_data_skip=is_stream,  # It begins where it was stopped.
        ddp_find_unused_parameters=False,  # All that is trained takes part in every loss.
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.evaluate_every else "no",
        eval_steps=settings.evaluate_every or None,
        save_strategy="steps",
        save_steps=min(settings.save_every or steps, steps),
        dataloader_num_workers=settings.num_workers,
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=False,  # Otherwise the log level decides.
        report_to=["tensorboard"],
        seed=seed,
        **(sharding_arguments(sharded) if sharded else {}),
    )
    if sharded:
        shard_on_cpu_as_well()
    if arguments.n_gpu > 1:  # Without a launcher. DataParallel would share out noise and multiply the step.
        arguments._n_gpu = 1
    return arguments


def _sync(folder: Path) -> None:
    """Make sure that the files of a folder are on disk before it gets its final name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
