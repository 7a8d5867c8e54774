"""The blocks that a network is trained and scored on."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from calm.data.chunking import BlockSettings
from calm.data.prepared import PreparedData, split_of
from calm.data.streaming import BlockStream, Position, StreamSettings
from calm.training.opening import data_folder, reading_options
from calm.training.processes import processes
from calm.training.recipe import Recipe
from calm.training.runs import Run


@dataclass(frozen=True)
class Blocks:
    """Training and held-out blocks.

    Args:
        training: Training blocks from `calm.data.chunking`, or a stream of them.
        held_out: Held-out blocks.
        context: Tokens per block.
        tokenizer: Their tokenizer, saved with each checkpoint.
        collate: Collates blocks into a batch; None for the network's default.
        is_in_order: Whether training blocks are read in order instead of shuffled.
    """

    training: Any
    held_out: Any
    context: int
    tokenizer: PreTrainedTokenizerBase
    collate: Callable[..., dict[str, Any]] | None = None
    is_in_order: bool = False


def blocks_of(run: Run[Recipe], data: PreparedData, num_workers: int, scored_chunk_size: int) -> Blocks:
    """The blocks of a run.

    Args:
        run: The run.
        data: Its prepared text.
        num_workers: Data-loading workers of each process.
        scored_chunk_size: Tokens per chunk when the network is scored.
    """
    recipe = run.recipe
    held_out = _lay_out(recipe, data, "validation", scored_chunk_size)
    if recipe.data.streaming:
        training: datasets.Dataset | BlockStream = _stream(run, data, num_workers)
    else:
        training = _lay_out(recipe, data, "train", recipe.chunk_size)
    return Blocks(training, held_out, recipe.data.context, data.tokenizer)


def _lay_out(recipe: Recipe, data: PreparedData, split: str, chunk_size: int) -> datasets.Dataset:
    with processes().main_process_first():  # The main process fills the cache.
        return data.blocks(split, chunk_size=chunk_size, **asdict(block_settings(recipe)))


def block_settings(recipe: Recipe) -> BlockSettings:
    """How a run lays out its text, whenever it is trained or scored."""
    return BlockSettings(recipe.data.context, recipe.data.layout, recipe.seed)


def _stream(run: Run[Recipe], data: PreparedData, num_workers: int) -> BlockStream:
    recipe, settings, group = run.recipe, run.recipe.data, processes()
    split = split_of(data_folder(recipe, run.folder))
    stream = StreamSettings(
        sources=settings.source_list,
        options=reading_options(settings),
        chunk_size=recipe.chunk_size,
        block_size=settings.context,
        layout=settings.layout,
        seed=recipe.seed,
        window=settings.window_documents,
        held_out_below=split.highest,
        held_out_seed=split.seed,
        part_bytes=split.part_bytes,
    )
    position = Position(group.num_processes, max(1, num_workers))
    return BlockStream(stream, data.tokenizer, position, group.process_index)
