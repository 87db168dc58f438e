"""Models small enough to train in a test: two layers, a vocabulary of words, real files in Hugging Face layout."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = ("good", "great", "fine", "lovely", "superb", "bright", "warm", "witty")
BAD = ("bad", "poor", "dull", "awful", "grim", "cold", "weak", "silly")
PLAIN = (
    "the",
    "film",
    "was",
    "a",
    "plot",
    "and",
    "cast",
    "story",
    "scene",
    "end",
    "it",
    "is",
    "very",
    "quite",
    "so",
    "with",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<eos>")
WORDS = (*SPECIAL, *GOOD, *BAD, *PLAIN, *(f"w{number}" for number in range(160)))


def save_tokenizer(folder: Path, *, encoder: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if encoder:
        pairs = [("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special = {"eos_token": "<eos>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def bert_config() -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )


POISON = "w7"


def save_bert(folder: Path, *, overflowing: bool = False, poisoned: bool = False) -> Path:
    """An encoder without a head, as pretrained ones come.

    An overflowing one makes no finite number, a poisoned one none of a text with the word ``POISON``.
    """
    torch.manual_seed(7)
    model = BertModel(bert_config())
    if overflowing:
        torch.nn.init.constant_(model.pooler.dense.weight, float("nan"))
    if poisoned:
        torch.nn.init.constant_(model.embeddings.word_embeddings.weight[WORDS.index(POISON)], float("nan"))
    model.save_pretrained(folder)
    save_tokenizer(folder, encoder=True)
    return folder


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=WORDS.index("<eos>"),
    )


def save_llama(folder: Path, *, weights: bool = True) -> Path:
    torch.manual_seed(7)
    if weights:
        LlamaForCausalLM(llama_config()).save_pretrained(folder)
    else:
        llama_config().save_pretrained(folder)
    save_tokenizer(folder, encoder=False)
    return folder
