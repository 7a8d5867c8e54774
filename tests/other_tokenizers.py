"""Small tokenizers like those of well-known models."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calm.data.stories import stories
from calm.data.tokenizer import train_tokenizer

_TEXTS = [*stories(0, 30), "</s> <s> <|im_end|> </ s > <| im _ end |>", "Größe, 日本 & [SEP]"]
_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def byte_level() -> PreTrainedTokenizerFast:
    """Like those that calm trains: `<|bos|> $A`."""
    return train_tokenizer(_TEXTS, 400)


def unigram(template: str = "<s> $A </s>", prepend: str = "always") -> PreTrainedTokenizerFast:
    """Like SentencePiece's, with an end-of-text token after every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return _fast(tokenizer, template)


def llama(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Like the first Llama's: BPE with ▁ for spaces, and bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*_SPECIAL, *byte_tokens],
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][: len(_SPECIAL)]
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return _fast(Tokenizer.from_str(json.dumps(state)), template)


def words() -> PreTrainedTokenizerFast:
    """Whole words, control tokens among them."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return _fast(tokenizer, "$A </s>")


def bert() -> PreTrainedTokenizerFast:
    """Lower-cased word pieces between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )


def slow() -> PreTrainedTokenizerBase:
    """A tokenizer without a fast backend, with an end-of-text token after every text."""
    return ByT5Tokenizer()


KINDS = {
    "byte-level": byte_level,
    "unigram": unigram,
    "unigram, first": lambda: unigram(prepend="first"),
    "llama": llama,
    "llama with an end": lambda: llama("<s> $A </s>"),
    "words": words,
    "bert": bert,
    "slow": slow,
}
LOSSLESS = ("byte-level", "unigram", "unigram, first", "llama", "llama with an end", "slow")


def _fast(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    named = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_ROLES)
