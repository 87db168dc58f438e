"""``finetune``, which needs no cluster, and ``kubectl-finetune``, which is about one. Neither needs torch; each group of commands is a package."""
