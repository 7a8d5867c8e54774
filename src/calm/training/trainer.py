"""The Hugging Face Trainer with our losses, optimizers, held-out scores and checkpoints."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, ProgressCallback, Trainer

from calm.data.counts import pluralize
from calm.data.streaming import CURSOR, BlockStream
from calm.errors import InputError, NotFiniteError, RunError, Terminated, reason_of
from calm.hardware import fast_float32, width_of
from calm.models.language_model import language_model
from calm.storage.disk import disk_errors
from calm.training.arguments import Score, TrainingStage, training_arguments
from calm.training.batches import (
    NUMBERS,
    ChunkNetwork,
    batches_of_stream,
    collate_chunks,
    collate_tokens,
    whole_step_sampler,
)
from calm.training.blocks import Blocks
from calm.training.checkpoints import atomic_checkpoint, checkpoints_in, newest_intact_checkpoint
from calm.training.clock import Clock
from calm.training.extending import SaveAt, kept_step
from calm.training.faults import LossWatch, StopOnSignal, check_weights, diverged
from calm.training.inputs import changed_input, copy_inputs
from calm.training.noise import generators_of_blocks
from calm.training.optimizers import build_optimizer, build_scheduler, follow_schedule
from calm.training.processes import processes
from calm.training.progress import StageProgress
from calm.training.sharding import KeepTiedEmbedding, check_checkpoint, keep_autocast, unsharded_copy
from calm.training.speed import SpeedMeter, known_training_flops
from calm.training.trackers import tracked

logger = logging.getLogger(__name__)


class ChunkTrainer(Trainer):
    """Trains the autoencoder or a language model on blocks.

    Args:
        model: The network.
        blocks: What it is trained and scored on.
        score: Scores it on the held-out blocks; the scores are logged.
        stage: How it is trained, and where its checkpoints go.
        adapted: The `peft.PeftModel` around the network, if adapters are trained.
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Blocks, score: Score, stage: TrainingStage, adapted: Any = None
    ) -> None:
        settings = stage.settings
        self.score, self.settings = score, settings
        self._network, self._stage, self._context = model, stage, blocks.context
        self._is_in_order = blocks.is_in_order
        self._stream = blocks.training if isinstance(blocks.training, BlockStream) else None
        self._staging: Path | None = None
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        has_chunks = isinstance(model, ChunkNetwork)
        counter: Any = model if has_chunks else language_model(model)
        self._count_targets: Callable[..., Tensor] = counter.count_targets
        super().__init__(
            model=adapted if adapted is not None else model,
            args=training_arguments(stage, blocks.context, model, is_stream=self._stream is not None),
            train_dataset=blocks.training,
            eval_dataset=blocks.held_out,
            processing_class=blocks.tokenizer,
            data_collator=blocks.collate or (collate_chunks if has_chunks else collate_tokens),
        )
        self.model_accepts_loss_kwargs = True  # The loss is a mean over the targets counted here.
        self.remove_callback(ProgressCallback)
        self._progress = StageProgress(stage.name)
        self.add_callback(self._progress)
        self._speed = SpeedMeter(
            settings.batch_tokens // self.args.world_size,
            known_training_flops(model.config, blocks.context, stage.teacher),
            self.args.device,
            torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        )
        self.add_callback(self._speed)
        self._clock = Clock()
        self.add_callback(self._clock)
        self._loss_watch = LossWatch(self.args.device)
        self._kept_step = kept_step(settings) if stage.is_last else None
        self.add_callback(SaveAt(self._kept_step))
        self._sigterm = StopOnSignal()
        self.add_callback(self._sigterm)
        self.add_callback(KeepTiedEmbedding())
        for callback in stage.hooks.callbacks:
            self.add_callback(callback)
        if stage.teacher is not None:
            torch.nn.Module.to(stage.teacher.network, self.args.device)

    def train_or_resume(self) -> None:
        """Train from the last intact checkpoint, or from the start; end with a held-out evaluation.

        Raises:
            InputError: If the checkpoint is sharded and the run is not, or vice versa, it belongs to another
                run, or all checkpoints are damaged.
            RunError: If the loss is not finite, a data-loading worker dies, the disk is full, or a tracker
                cannot start.
            Terminated: If SIGTERM asked the run to stop; it has written a checkpoint.
        """
        checkpoint = self._checkpoint()
        width = width_of(self._network.config)
        with tracked(self, self._stage.tracking), fast_float32(self.args.device, width):
            self._train_from(checkpoint)
            if not self.settings.evaluate_every:
                self.evaluate()

    def _train_from(self, checkpoint: Path | None) -> None:
        try:
            with self._sigterm.listening():
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            reason = reason_of(error)
            if self.args.dataloader_num_workers and not isinstance(error, RuntimeError):
                # It died while handing over a batch, before the DataLoader noticed that it was gone.
                reason = f"A DataLoader worker died ({reason})."
            if "DataLoader worker" not in reason:
                raise
            raise RunError(f"{reason} Lower num_workers or set it to 0; {self._resume_hint()}.") from error
        finally:
            self._progress.close()
        self._log_skipped()
        if self._sigterm.has_stopped:
            raise Terminated(
                f"stopped by SIGTERM after step {self.state.global_step}; {self._resume_hint()}."
            )

    def unsharded_network(self) -> PreTrainedModel:
        """The model with all weights: itself, or an unsharded copy."""
        return unsharded_copy(self._network)

    # Batches and their loss.

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the training blocks, or of the stream in its own order."""
        if self._stream is None:
            return super().get_train_dataloader()
        collate = self._get_collator_with_removed_columns(self.data_collator)
        return batches_of_stream(self._stream, self._train_batch_size, collate, self.args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """A random order of whole steps, or the blocks' own order if they have one."""
        blocks: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self._is_in_order:
            return SequentialSampler(blocks)
        return whole_step_sampler(blocks, self.settings.batch_tokens // self._context)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor | int | None:
        """Number of targets in an optimizer step over all processes; the loss is a mean over them."""
        if not batch_samples:
            return None
        counts = [self._count_targets(batch["labels"], batch.get("position_ids")) for batch in batch_samples]
        count = torch.stack(counts).sum(0).to(device)
        if self.args.world_size > 1:
            count = self.accelerator.reduce(count)
        return count.clamp_min(1)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, with noise that depends only on the seed, the step and each block.

        If there is a teacher, it reads the batch as well.
        """
        cursor = inputs.pop(CURSOR, None)
        if cursor is not None and self._stream is not None:
            self._stream.position.record(*cursor.tolist())
        numbers = inputs.pop(NUMBERS, None)
        if numbers is not None:
            step, device = self.state.global_step, inputs["input_ids"].device
            generators = generators_of_blocks(self.args.seed, step, numbers.tolist(), device)
            draw: Any = self._network.draw_training_noise
            inputs["noise"] = draw(generators, **inputs)
        if self._stage.teacher is not None:
            inputs["teacher_output"] = self._stage.teacher.output(**inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Train on one batch, and record the first loss that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_watch.record(loss, self.state.global_step + 1)
        return loss

    # Optimizer and schedule.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that the recipe names."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                model or self._network, self.settings.optimizer, self.settings.precision
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule that the recipe names."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            schedule: Any = build_scheduler(optimizer, self.settings.optimizer, num_training_steps)
            self.lr_scheduler = schedule
            self._created_lr_scheduler = True
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both from a checkpoint; an extended run follows its new schedule at once."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            follow_schedule(self.optimizer, self.lr_scheduler)

    # What is logged.

    def _log_skipped(self) -> None:
        """Log how many records without text the stream has skipped, over all processes."""
        if self._stream is None:
            return
        counts = self.accelerator.gather(torch.tensor([self._stream.num_skipped()], device=self.args.device))
        skipped = int(counts.sum() if self._stream.has_own_shards else counts.max())
        if skipped and self.is_world_process_zero():
            logger.info("text: skipped %s without text while streaming", pluralize(skipped, "record"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values and the seconds so far; with a training loss, also the speed of training."""
        if "loss" in logs:
            self._loss_watch.check(self._resume_hint())
            logs |= self._speed.read(self.state.global_step)
        if (seconds := self._clock.seconds) is not None:
            logs = {**logs, "seconds": round(seconds, 2)}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the model on held-out text and log the scores."""
        was_training = self._network.training
        self._network.eval()
        with self._speed.pause():
            try:
                scores = self._scores(self.unsharded_network())
            except NotFiniteError as error:  # Otherwise the next step's loss would be the first to show it.
                step = self.state.global_step
                raise diverged(f"the model's output after step {step}", self._resume_hint()) from error
        self._network.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores(self, network: PreTrainedModel) -> dict[str, float]:
        """The scores of a model on held-out text, and those that the user adds."""
        scores = dict(self.score(network, self.eval_dataset))
        for score in self._stage.hooks.scores:
            added = score(network, self.eval_dataset)
            if taken := scores.keys() & added.keys():
                raise ValueError(f"there is a score '{min(taken)}' already: give yours another name.")
            scores |= added
        return scores

    # Checkpoints.

    def _checkpoint(self) -> Path | None:
        """The checkpoint to resume from, checked to belong to this run; None if there is none."""
        folder = self._stage.folder
        folder.mkdir(parents=True, exist_ok=True)
        if (checkpoint := newest_intact_checkpoint(folder)) is None:
            return None
        check_checkpoint(checkpoint, self._stage.is_sharded)
        if (changed := changed_input(folder, checkpoint)) is not None:
            raise InputError(
                f"'{checkpoint}' belongs to another run: {changed} changed. Put back the checkpoints of this "
                "run."
            )
        if self._stream is not None:
            self._stream.position.load(checkpoint / self._position_file)
        return checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint atomically."""
        step, resume_hint = self.state.global_step, self._resume_hint()
        self._loss_watch.check(resume_hint)
        check_weights(self._network, step, resume_hint)
        folder = Path(super()._get_output_dir(trial))
        with (
            self._speed.pause(),
            disk_errors(folder / f"checkpoint-{step}", resume_hint),
            atomic_checkpoint(folder, step, self.settings.keep_checkpoints, self._kept_step) as partial,
        ):
            self._staging = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self._stream is not None:
                self._stream.position.save(partial / self._position_file)
            if self.args.should_save:
                copy_inputs(self._stage.folder, partial)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    @property
    def _position_file(self) -> str:
        return f"position_{processes().process_index}.json"

    def _resume_hint(self) -> str:
        """From where the run could be resumed if it ended now, for messages."""
        checkpoints = checkpoints_in(self._stage.folder)
        return f"--resume continues from '{checkpoints[-1]}'" if checkpoints else "there is no checkpoint yet"

    # Sharded networks.

    def create_accelerator_and_postprocess(self) -> None:
        """Set up accelerate, which places the model on its device and shards or replicates it."""
        super().create_accelerator_and_postprocess()
        if self._stage.is_sharded:
            keep_autocast(self.accelerator)

    def compute_loss_context_manager(self) -> Any:
        """The context of the loss: accelerate wraps models in autocast, but not sharded ones."""
        if not self._stage.is_sharded or self.settings.precision != "bf16":
            return super().compute_loss_context_manager()
        return torch.autocast(self.args.device.type, torch.bfloat16)
