"""An unmodified transformers script: knows nothing of this project."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = torch.arange(8) + index
        return {"input_ids": row, "labels": row}


class Unthrottled(TrainerCallback):
    """The callback posts every five seconds at most; a test has less time."""

    def on_init_end(self, args, state, control, **kwargs):
        from transformers.integrations.integration_utils import KubeflowCallback

        KubeflowCallback._MIN_UPDATE_INTERVAL = 0.0


size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
arguments = TrainingArguments(
    output_dir=sys.argv[1],
    max_steps=6,
    per_device_train_batch_size=2,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=3,
    save_strategy="no",
    use_cpu=True,
)
model = LlamaForCausalLM(LlamaConfig(**size))
Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Unthrottled()]).train()
