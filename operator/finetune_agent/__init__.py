"""PID 1 of a training pod: runs the gang's workers as the operator orders, and reports what became of them.

A container runs ``agent.pyz`` (see build), which is several programs in one file, each the parent of the next::

    stub         PID 1: reaps orphans, starts the agent process again when it dies            stub.py
    agent        talks to the job server, decides, starts and ends generations                agent.py, loop.py
    torchrun     for scripts: the image's own torch.distributed.run, with static membership   torchrun_wrapper.py
    fork-server  for the recipe's trainer: has imported it and forks it                       fork_server.py
    worker       one per local rank: prefixes its output, tells the agent how it ended        worker.py

Standard library only, Python 3.9: it is carried into images that the project did not build.
"""

__version__ = "0.1.0"
