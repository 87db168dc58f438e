"""A model small enough to train in milliseconds, and awkward enough to find wrong intervals: odd sizes, two parameter groups."""

import hashlib
import random
from dataclasses import dataclass, field

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

# DeepSpeed asks the processor for native FP16, which few have; PyTorch computes FP16 on all of them.
get_accelerator().is_fp16_supported = lambda: True

MICRO_BATCH = 3
TOKENS, WIDTH, HIDDEN, CLASSES, RANK = 37, 11, 29, 5, 3


@dataclass(frozen=True)
class Case:
    """How an engine is configured."""

    name: str
    stage: int
    precision: str = "FP32"
    lora: bool = False
    offload: bool = False
    accumulation: int = 1
    autocast: bool = False
    loss_scale_power: int = 18
    """The first scale of this overflows, so that skipped steps and a moving scale are part of the state."""
    zero: dict = field(default_factory=dict)


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank detour."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Trainee(nn.Module):
    """Embedding, hidden layer, normalisation, head; returns the loss."""

    def __init__(self, lora):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.hidden = nn.Linear(WIDTH, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)
        if lora:
            self.embedding.weight.requires_grad_(False)
            self.hidden = LowRank(self.hidden)

    def forward(self, tokens, labels):
        x = self.norm(torch.relu(self.hidden(self.embedding(tokens).mean(1))))
        return nn.functional.cross_entropy(self.head(x).float(), labels)


def new_engine(case):
    random.seed(0)
    torch.manual_seed(0)
    model = Trainee(case.lora)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        config=configuration(case),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4) * 0.97**step),
    )
    return engine


def configuration(case):
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": 20, **case.zero}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if case.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "betas": [0.9, 0.98], "torch_adam": True}},
    }
    if case.precision == "BF16":
        config["bf16"] = {"enabled": True}
    if case.precision == "FP16":
        scale = {"initial_scale_power": case.loss_scale_power, "loss_scale_window": 3, "hysteresis": 1}
        config["fp16"] = {"enabled": True, **scale}
    if case.autocast:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def train(engine, steps):
    """Train the given steps; the data of a step is a function of its number and the rank. Return the losses as text."""
    losses = []
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(1000 * step + 10 * micro + dist.get_rank())
            tokens = torch.randint(0, TOKENS, (MICRO_BATCH, 7), generator=generator)
            labels = torch.randint(0, CLASSES, (MICRO_BATCH,), generator=generator)
            loss = engine(tokens.to(engine.device), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(repr(loss.item()))
    return losses


def weights_digest(engine):
    """Hash every parameter, frozen ones too, as the forward pass would use them."""
    digest = hashlib.sha256()
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
