"""``finetune``: the command line. Needs neither a cluster nor torch; each group of commands is a package of its own."""
