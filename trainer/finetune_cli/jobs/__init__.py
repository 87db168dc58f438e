"""Jobs in a cluster: ``kubectl finetune``."""
