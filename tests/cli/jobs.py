"""Jobs of two ranks whose checkpoints the command line is held against, and the models that they start from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertModel, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tests.trainer.launch import Case
from tests.trainer.recipes import classification, language_modelling
from tests.trainer.tiny_models import WORDS, bert_config, llama_config, save_bert, save_tokenizer

LORA = {"method": "LoRA", "rank": 4, "alpha": 8}
EVERY_FOUR = {"intervalSteps": 4, "keep": 3}


def save_models(folder: Path) -> None:
    save_bert(folder / "bert")
    torch.manual_seed(7)
    BertModel(bert_config(), add_pooling_layer=False).save_pretrained(folder / "bert-without-pooler")
    save_tokenizer(folder / "bert-without-pooler", encoder=True)
    llama = llama_config()
    llama.tie_word_embeddings = True
    LlamaForCausalLM(llama).save_pretrained(folder / "llama-tied")
    save_tokenizer(folder / "llama-tied", encoder=False)
    GPT2LMHeadModel(gpt2_config()).save_pretrained(folder / "gpt2", max_shard_size="20KB")
    save_tokenizer(folder / "gpt2", encoder=False)


def gpt2_config() -> GPT2Config:
    end = WORDS.index("<eos>")
    return GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=end, eos_token_id=end
    )


def cases(files: Path, models: str) -> dict[str, Case]:
    """``files`` holds data and models, ``models`` is the URI of the same models in the store."""

    def case(recipe: Callable[..., dict[str, Any]], precision: str, stage: int, model: str, **changes: Any) -> Case:
        source = {"source": f"{models}/{model}"}
        made = recipe(files, model=model, training={"precision": precision}, zero={"stage": stage}, **changes)
        return Case(made | {"model": source}, checkpoint=EVERY_FOUR)

    here = f"file://{files}/llama-tied"
    tied_here = case(language_modelling, "BF16", 2, "llama-tied", tuning=LORA)
    tied_here.recipe["model"] = {"source": here}
    return {
        "full-bf16-zero-2": case(classification, "BF16", 2, "bert"),
        "full-fp32-zero-3": case(classification, "FP32", 3, "bert"),
        "full-fp16-zero-1": case(classification, "FP16", 1, "bert"),
        "full-tied-bf16-zero-3": case(language_modelling, "BF16", 3, "llama-tied"),
        "lora-bf16-zero-2": case(classification, "BF16", 2, "bert", tuning=LORA),
        "lora-fp32-zero-3": case(classification, "FP32", 3, "bert", tuning=LORA),
        "lora-bf16-zero-3-drawn-pooler": case(classification, "BF16", 3, "bert-without-pooler", tuning=LORA),
        "lora-tied-bf16-zero-2-mounted": tied_here,
        "lora-conv1d-fp32-zero-2": case(language_modelling, "FP32", 2, "gpt2", tuning=LORA),
    }
