"""What to train: ``spec.recipe``, and letter for letter the file the trainer reads in its pod."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.schema import ApiModel, DataUri, Line, ModelUri, Rule


class Initialization(StrEnum):
    """Where the first weights come from."""

    PRETRAINED = "Pretrained"
    RANDOM = "Random"


class TaskType(StrEnum):
    """What the model learns to do."""

    SEQUENCE_CLASSIFICATION = "SequenceClassification"
    CAUSAL_LM = "CausalLM"


class TuningMethod(StrEnum):
    """Which weights are trained."""

    FULL = "Full"
    LORA = "LoRA"


class Precision(StrEnum):
    """Arithmetic of the forward and backward passes; master weights are always FP32."""

    FP32 = "FP32"
    BF16 = "BF16"
    FP16 = "FP16"


class OptimizerName(StrEnum):
    """The optimizer."""

    ADAMW = "AdamW"


class ScheduleName(StrEnum):
    """Shape of the learning rate after warm-up."""

    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"


class MetricName(StrEnum):
    """What an evaluation measures beside the loss."""

    ACCURACY = "Accuracy"
    MACRO_F1 = "MacroF1"
    PERPLEXITY = "Perplexity"

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one; of two checkpoints, say."""
        return self is not MetricName.PERPLEXITY


class OffloadTarget(StrEnum):
    """Where ZeRO keeps what it takes off the device."""

    NONE = "None"
    CPU = "CPU"


class LossSpike(StrEnum):
    """What to do about a loss far above all that came before it."""

    ROLL_BACK = "RollBack"
    IGNORE = "Ignore"


METRICS_OF_TASK: dict[TaskType, frozenset[MetricName]] = {
    TaskType.SEQUENCE_CLASSIFICATION: frozenset({MetricName.ACCURACY, MetricName.MACRO_F1}),
    TaskType.CAUSAL_LM: frozenset({MetricName.ACCURACY, MetricName.PERPLEXITY}),
}

Column = Annotated[Line, Field(max_length=128)]
Label = Annotated[Line, Field(max_length=128)]


class Model(ApiModel):
    """The model to start from: a directory in Hugging Face layout (config, tokenizer, safetensors)."""

    source: ModelUri
    """s3://bucket/path, pvc://claim/path, file:///path in the image, or hf://organisation/name@revision."""
    initialization: Initialization = Initialization.PRETRAINED
    """Pretrained loads the weights beside the config; Random initialises from the config alone (pretraining from scratch)."""


class Task(ApiModel):
    """What the model learns to do."""

    type: TaskType
    """SequenceClassification, or CausalLM."""
    labels: list[Label] | None = Field(default=None, min_length=2, max_length=400)
    """SequenceClassification: the class names, in the order of their ids."""

    rules = (
        Rule(
            cel="self.type == 'SequenceClassification' ? has(self.labels) : !has(self.labels)",
            message="labels are required for SequenceClassification and not allowed for any other type",
            check=lambda task: (task.type == TaskType.SEQUENCE_CLASSIFICATION) == (task.labels is not None),
            field="labels",
        ),
        Rule(
            # Not a list of type set: the API server compares sets without order, and the order of labels is their ids. Comparing each
            # with each costs number² x length, and 400 labels of 128 characters are what the API server's cost limit leaves.
            cel="!has(self.labels) || self.labels.all(label, self.labels.exists_one(other, other == label))",
            message="labels must be unique",
            check=lambda task: task.labels is None or len(set(task.labels)) == len(task.labels),
            field="labels",
        ),
    )


class DataSource(ApiModel):
    """One file of examples."""

    source: DataUri
    """A .jsonl, .csv or .parquet file at s3://bucket/path, pvc://claim/path or file:///path in the image."""


class Columns(ApiModel):
    """The names of the columns to read."""

    text: Column = "text"
    """The text to train on."""
    label: Column = "label"
    """SequenceClassification: the column that holds one of task.labels."""


class Data(ApiModel):
    """The examples."""

    train: DataSource
    """What is trained on."""
    evaluation: DataSource | None = None
    """What metrics are computed on; never trained on."""
    columns: Columns = Field(default_factory=Columns)
    """The names of the columns to read."""
    max_tokens: int = Field(default=512, ge=8, le=1048576)
    """Longest sequence, in tokens. SequenceClassification truncates; CausalLM splits its text into blocks of this length."""


class Tuning(ApiModel):
    """Which weights are trained."""

    method: TuningMethod = TuningMethod.FULL
    """Full trains every weight; LoRA trains low-rank adapters beside frozen weights and merges them into the result."""
    rank: int | None = Field(default=None, ge=1, le=1024)
    """LoRA: rank of the adapters."""
    alpha: float | None = Field(default=None, gt=0, le=65536)
    """LoRA: scale of the adapters is alpha / rank. Default: the rank."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """LoRA: dropout in front of the adapters. Default: 0."""
    targets: list[Line] | None = Field(default=None, min_length=1, max_length=64)
    """LoRA: names of the linear modules that get adapters. Default: all linear modules but the head."""

    rules = (
        Rule(
            cel="self.method == 'LoRA' ? has(self.rank) : "
            "!has(self.rank) && !has(self.alpha) && !has(self.dropout) && !has(self.targets)",
            message="LoRA needs a rank; rank, alpha, dropout and targets are not allowed for any other method",
            check=lambda tuning: (
                tuning.rank is not None
                if tuning.method == TuningMethod.LORA
                else (tuning.rank, tuning.alpha, tuning.dropout, tuning.targets) == (None,) * 4
            ),
        ),
    )


class Optimizer(ApiModel):
    """The optimizer and its constants."""

    name: OptimizerName = OptimizerName.ADAMW
    """AdamW: decoupled weight decay, none on biases and normalisation weights."""
    learning_rate: float = Field(default=2.0e-5, gt=0, le=10)
    """Peak learning rate, after warm-up."""
    weight_decay: float = Field(default=0.0, ge=0, le=10)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = Field(default=1.0e-8, gt=0, le=1)
    """Added to the root of the second moment."""


class Schedule(ApiModel):
    """How the learning rate moves."""

    name: ScheduleName = ScheduleName.LINEAR
    """After warm-up: Constant, Linear to zero, or Cosine to zero."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Warm-up as a share of all steps. Not together with warmupSteps."""
    warmup_steps: int | None = Field(default=None, ge=0, le=100000000)
    """Warm-up in steps. Not together with warmupRatio."""

    rules = (
        Rule(
            cel="!has(self.warmupRatio) || !has(self.warmupSteps)",
            message="warmupRatio and warmupSteps cannot both be set",
            check=lambda schedule: schedule.warmup_ratio is None or schedule.warmup_steps is None,
        ),
    )


class Training(ApiModel):
    """How long, how large, how fast. Nothing here depends on how many nodes there are."""

    epochs: float | None = Field(default=None, gt=0, le=100000)
    """Passes over the training data. Exactly one of epochs and steps."""
    steps: int | None = Field(default=None, ge=1, le=100000000)
    """Optimizer steps. Exactly one of epochs and steps."""
    global_batch_size: int = Field(ge=1, le=1048576)
    """Sequences per optimizer step, over all ranks, whatever their number."""
    micro_batch_size: int | None = Field(default=None, ge=1, le=65536)
    """Sequences per forward pass; must divide globalBatchSize. Default: by the model's size."""
    precision: Precision = Precision.BF16
    """FP32, BF16 or FP16 (with dynamic loss scaling)."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """The optimizer and its constants."""
    schedule: Schedule = Field(default_factory=Schedule)
    """How the learning rate moves."""
    max_gradient_norm: float = Field(default=1.0, ge=0, le=1000000)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    on_loss_spike: LossSpike = LossSpike.ROLL_BACK
    """RollBack goes back to a checkpoint before a sudden loss and leaves out the samples that led to it; Ignore trains on."""
    seed: int = Field(default=42, ge=0, le=4294967295)
    """Seed of initial weights, sample order and dropout."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    rules = (
        Rule(
            cel="has(self.epochs) != has(self.steps)",
            message="exactly one of epochs and steps must be set",
            check=lambda training: (training.epochs is None) != (training.steps is None),
        ),
        Rule(
            cel="!has(self.microBatchSize) || self.globalBatchSize % self.microBatchSize == 0",
            message="globalBatchSize must be a multiple of microBatchSize",
            check=lambda training: (
                training.micro_batch_size is None or training.global_batch_size % training.micro_batch_size == 0
            ),
            field="microBatchSize",
        ),
    )


class Evaluation(ApiModel):
    """When and what to evaluate."""

    every_steps: int | None = Field(default=None, ge=1, le=100000000)
    """Evaluate after every so many steps. The end of training is always evaluated."""
    metrics: list[MetricName] = Field(min_length=1, max_length=8)
    """Accuracy and MacroF1 for SequenceClassification; Accuracy and Perplexity for CausalLM."""

    rules = (
        Rule(
            cel="self.metrics.all(metric, self.metrics.exists_one(other, other == metric))",
            message="metrics must be unique",
            check=lambda evaluation: len(set(evaluation.metrics)) == len(evaluation.metrics),
            field="metrics",
        ),
    )


class Offload(ApiModel):
    """What ZeRO moves to host memory."""

    optimizer: OffloadTarget = OffloadTarget.NONE
    """Optimizer states; needs stage 1 or higher."""
    parameters: OffloadTarget = OffloadTarget.NONE
    """Parameters; needs stage 3."""


class Zero(ApiModel):
    """How DeepSpeed ZeRO shards training state over the ranks."""

    stage: int = Field(default=2, ge=0, le=3)
    """0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    offload: Offload = Field(default_factory=Offload)
    """What ZeRO moves to host memory."""

    rules = (
        Rule(
            cel="self.offload.optimizer == 'None' || self.stage >= 1",
            message="offloading the optimizer needs stage 1 or higher",
            check=lambda zero: zero.offload.optimizer == OffloadTarget.NONE or zero.stage >= 1,
            field="stage",
        ),
        Rule(
            cel="self.offload.parameters == 'None' || self.stage == 3",
            message="offloading parameters needs stage 3",
            check=lambda zero: zero.offload.parameters == OffloadTarget.NONE or zero.stage == 3,
            field="stage",
        ),
    )


class Recipe(ApiModel):
    """What to train, in full: model, task, data, tuning, training, evaluation, sharding."""

    model: Model
    """The model to start from."""
    task: Task
    """What the model learns to do."""
    data: Data
    """The examples."""
    tuning: Tuning = Field(default_factory=Tuning)
    """Which weights are trained."""
    training: Training
    """How long, how large, how fast."""
    evaluation: Evaluation | None = None
    """When and what to evaluate; needs data.evaluation."""
    zero: Zero = Field(default_factory=Zero)
    """How DeepSpeed ZeRO shards training state over the ranks."""

    rules = (
        Rule(
            cel="has(self.evaluation) == has(self.data.evaluation)",
            message="evaluation and data.evaluation must be set together",
            check=lambda recipe: (recipe.evaluation is None) == (recipe.data.evaluation is None),
            field="evaluation",
        ),
        Rule(
            cel="!has(self.evaluation) || self.evaluation.metrics.all(metric, metric == 'Accuracy'"
            " || (metric == 'MacroF1' && self.task.type == 'SequenceClassification')"
            " || (metric == 'Perplexity' && self.task.type == 'CausalLM'))",
            message="MacroF1 is for SequenceClassification, Perplexity for CausalLM, Accuracy for both",
            check=lambda recipe: (
                recipe.evaluation is None or METRICS_OF_TASK[recipe.task.type].issuperset(recipe.evaluation.metrics)
            ),
            field="evaluation",
        ),
        Rule(
            cel="self.model.initialization == 'Pretrained' || self.tuning.method == 'Full'",
            message="LoRA needs pretrained weights: initialization Random goes with tuning method Full",
            check=lambda recipe: (
                recipe.model.initialization == Initialization.PRETRAINED or recipe.tuning.method == TuningMethod.FULL
            ),
            field="tuning",
        ),
    )
