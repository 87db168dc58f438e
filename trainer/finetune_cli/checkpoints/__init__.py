"""``finetune checkpoints``: what a job has saved, whether it is whole, a model made of it, and what may go."""
