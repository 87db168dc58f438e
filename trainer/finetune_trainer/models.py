"""Builds the tokenizer and the model, with the same first weights whatever the number of ranks and the ZeRO stage.

Under ZeRO-3 transformers builds each weight already sharded and initialises it on rank 0 alone, in another order than without. To have
one and the same start everywhere, what was not loaded is initialised again by us: module after module, each from a random seed
made of its own name. On sharded weights the module is gathered for that, and only for that.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from finetune_api.recipe import Initialization, Precision, Recipe
from finetune_trainer.data.batches import random_seed
from finetune_trainer.errors import BadConfig
from finetune_trainer.tasks import Task

DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}

# What transformers raises for files that do not fit together.
UNFIT = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)

# RoBERTa and its kin number positions from the padding id + 1 on: so many of their table's rows are never used.
OFFSET_POSITIONS = (
    "roberta",
    "camembert",
    "mpnet",
    "xlm-roberta",
    "xlm-roberta-xl",
    "longformer",
    "roberta-prelayernorm",
)


def load_tokenizer(folder: Path, uri: str) -> Any:
    """Load the tokenizer beside the model; one without a padding token pads with its end-of-text token.

    Raises:
        BadConfig: there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNFIT as error:
        raise BadConfig(f"{uri}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadConfig(f"{uri}: its tokenizer has neither a padding token nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(folder: Path, uri: str, *, recipe: Recipe, task: Task, tokenizer: Any) -> Any:
    """Load the model's configuration, fitted to the task.

    Raises:
        BadConfig: it is of no known model, or fits neither the tokenizer nor the recipe.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNFIT as error:
        raise BadConfig(f"{uri}: its config.json cannot be used: {_first_line(error)}") from None
    if type(config) not in task.model_class._model_mapping:  # noqa: SLF001  no public way to ask
        raise BadConfig(f"{uri}: a {config.model_type} model cannot do {recipe.task.type.value}")
    if config.get_text_config() is not config:
        raise BadConfig(
            f"{uri}: a {config.model_type} model is made of several, for text and for other things, which is not supported: "
            "take the one for text alone"
        )
    task.configure(config, tokenizer)
    _require_room(config, uri, recipe, tokenizer)
    return config


def build_model(folder: Path, uri: str, *, config: Any, recipe: Recipe, task: Task) -> PreTrainedModel:
    """Build the model in the recipe's precision. Collective under ZeRO-3, which shards it as it is built.

    Raises:
        BadConfig: the weights do not fit the configuration.
    """
    dtype = DTYPES[recipe.training.precision]
    torch.manual_seed(recipe.training.seed)
    try:
        if recipe.model.initialization == Initialization.RANDOM:
            model = task.model_class.from_config(config, dtype=dtype, trust_remote_code=False)
            fresh = {name for name, _ in model.named_parameters()}
        else:
            model, fresh = _load_weights(folder, uri, config, task, dtype)
    except UNFIT as error:
        raise BadConfig(f"{uri}: the weights do not fit the model: {_first_line(error)}") from None
    initialize(model, fresh, recipe.training.seed)
    if recipe.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the modules on top of the encoder or decoder."""
    prefix = getattr(model, "base_model_prefix", "")
    return [
        name for name, module in model.named_children() if name != prefix and any(True for _ in module.parameters())
    ]


def gathered(parameters: list[nn.Parameter], *, write: bool = False) -> AbstractContextManager[Any]:
    """Make sharded parameters whole inside the block; with ``write``, rank 0's changes are kept."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)  # type: ignore[no-any-return]
    return nullcontext()


def count_parameters(config: Any, task: Task) -> int:
    """Return the number of parameters that a model of this configuration has, without building one."""
    with torch.device("meta"):
        model = task.model_class.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def initialize(model: PreTrainedModel, fresh: set[str], seed: int) -> None:
    """Draw first values for the parameters named ``fresh``, each module from a seed of its own."""
    if not fresh:
        return
    for name, module, owner in _bottom_up(model, "", model):
        own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False)}
        below = {
            f"{name}.{child}.{key}".lstrip("."): p
            for child, inner in module.named_children()
            for key, p in inner.named_parameters(recurse=False)
        }
        for key, parameter in own.items():
            parameter._is_hf_initialized = key not in fresh  # type: ignore[attr-defined]  # noqa: SLF001
        if not fresh.isdisjoint(own | below):  # a module's rule may reach into its children (GPT-2)
            with gathered([*own.values(), *below.values()], write=True):
                torch.manual_seed(random_seed("weights", seed, name))
                owner._init_weights(module)  # noqa: SLF001  transformers' own rule for each kind of module
    model.tie_weights()


def _bottom_up(
    module: nn.Module, name: str, owner: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Yield all modules, children first, each with the model whose rules initialise it (models may hold models)."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for key, child in module.named_children():
        yield from _bottom_up(child, f"{name}.{key}".lstrip("."), owner)
    yield name, module, owner


def _load_weights(folder: Path, uri: str, config: Any, task: Task, dtype: torch.dtype) -> tuple[Any, set[str]]:
    model, told = task.model_class.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = set(told["missing_keys"])
    heads = tuple(f"{name}." for name in head_names(model))
    body = {name for name, _ in model.named_parameters() if not name.startswith(heads)} if heads else set()
    if body and body <= missing:
        raise BadConfig(f"{uri}: its weights are of another model: not one tensor of {type(model).__name__} is there")
    return model, missing


def _require_room(config: Any, uri: str, recipe: Recipe, tokenizer: Any) -> None:
    if len(tokenizer) > config.vocab_size:
        raise BadConfig(
            f"{uri}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {config.vocab_size}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    if recipe.data.max_tokens > positions:
        raise BadConfig(
            f"recipe.data.maxTokens is {recipe.data.max_tokens}, but {uri} takes at most {positions} tokens"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
