"""Tokenizers: load one, or train a byte-level BPE on the data."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calm.errors import InputError, reason_of
from calm.extras import require
from calm.hub.connection import may_be_on_hub
from calm.hub.gguf import as_hub_file, is_gguf
from calm.hub.opening import open_tokenizer

PAD, EOS, BOS = "<|pad|>", "<|eos|>", "<|bos|>"
_MIN_VOCAB_SIZE = 256 + 3  # All bytes and the special tokens.
_NO_LIMIT = int(1e12)  # Documents are cut into blocks later, so no length is too long.
# Learning merges takes time quadratic in the length of a piece. Words of ordinary text are far shorter.
_MAX_PIECE_BYTES = 1000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_ROLES = ("system", "user", "assistant", "tool", "end")


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError if a vocabulary cannot hold all bytes and the special tokens."""
    if vocab_size < _MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size must be at least {_MIN_VOCAB_SIZE} (all bytes and the special tokens), "
            f"got {vocab_size}."
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that prepends BOS to every text.

    BPE learns merges within pieces of text (words, numbers, runs of whitespace). For training only, longer
    pieces are split every 1000 bytes.

    Args:
        texts: Training text.
        vocab_size: Size of the vocabulary, special tokens included; it comes out smaller if there is little
            text.

    Raises:
        InputError: If the vocabulary cannot hold all bytes.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.FixedLength(_MAX_PIECE_BYTES)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = pieces
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _spare_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """An unused control token to pad with, so that the vocabulary does not outgrow the model's embeddings.

    Preferably one named as padding, reserved or unused, else the last one without another role: not BOS, EOS,
    UNK or mask, and not used by the chat template. Else UNK, if the tokenizer falls back to bytes and never
    emits it (as in Llama 2 and Mistral). None if there is none.
    """
    template = tokenizer.chat_template
    templates = list(template.values()) if isinstance(template, dict) else [template or ""]
    taken = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.mask_token}
    spare = [
        str(token)
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        and str(token) not in taken
        and not any(str(token) in text for text in templates)
        # Templates also build tokens from the names of roles, such as <|user|>.
        and str(token).strip("<|>[]/ ").lower() not in _ROLES
    ]
    for word in ("pad", "reserved", "unused"):
        if matching := [token for token in spare if word in token.lower()]:
            return matching[0]
    if spare:
        return spare[-1]
    return str(tokenizer.unk_token) if tokenizer.unk_token and _knows_all_bytes(tokenizer) else None


def _knows_all_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer falls back to byte tokens and has all 256, so that it never emits UNK."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    vocab = tokenizer.get_vocab()
    return bool(getattr(model, "byte_fallback", False)) and all(f"<0x{i:02X}>" in vocab for i in range(256))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains tokenizer files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it a padding token other than EOS.

    Args:
        name: A folder, a `tokenizer.json` or GGUF file, or a name on the hub.

    Raises:
        InputError: If there is none, or it has no end-of-text token.
    """
    if is_gguf(name):
        require(f"'{name}', a GGUF file,", "gguf")
    path, hub_file = Path(name), as_hub_file(name)
    is_file = path.suffix == ".json" or is_gguf(name)
    is_local = path.is_file() if is_file else path.is_dir()
    repository = name if hub_file is None else hub_file.repository
    is_on_hub = (hub_file is not None or not is_file) and may_be_on_hub(repository)
    if not is_local and not is_on_hub:
        raise InputError(f"there is no tokenizer {'file' if is_file else 'folder'} '{name}'; check the path.")
    try:
        tokenizer = open_tokenizer(name)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot load a tokenizer from '{name}' ({reason_of(error)}).") from error
    if tokenizer.eos_token_id is None:
        candidates = [token for token in ("</s>", "<|endoftext|>", EOS) if token in tokenizer.get_vocab()]
        if not candidates:
            raise InputError(f"the tokenizer '{name}' has no EOS token; set its eos_token.")
        tokenizer.eos_token = candidates[0]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Padding must differ from EOS, which is predicted.
        if (spare := _spare_token(tokenizer)) is not None:
            tokenizer.pad_token = spare
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer
