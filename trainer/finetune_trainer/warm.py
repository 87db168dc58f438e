"""What the agent's fork server needs of the trainer: import all that a worker will, once, so that it can be forked from there.

Nothing here may start a thread or ask for a GPU: a lock or a CUDA context is of no use in a child. Imports alone ask for none, but DeepSpeed
does when it has to find out which accelerator there is, so it is told, by the devices' files.
"""

import importlib
import os
from pathlib import Path

MODULES = (
    "finetune_trainer.__main__",
    "finetune_trainer.job",
    "finetune_trainer.ranks",
    "finetune_trainer.train",
    "torch.distributed.elastic.multiprocessing.errors",
    # What they import only when it is first used: 2 s at the first step.
    "boto3.s3.inject",
    "deepspeed.comm.mori",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "transformers.generation.utils",
    "transformers.modeling_layers",
)

IMPORT_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # else BLAS libraries start their threads as they are loaded
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # and pyarrow its allocator's
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch.cuda.is_available() then asks the driver's library, not the driver
}


def load() -> None:
    """Import everything. Changes the environment, which workers get anew."""
    os.environ.update(IMPORT_ENVIRONMENT)
    if Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cuda")
    importlib.import_module("finetune_trainer.__main__").quieten()
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("finetune_trainer.object_store.s3_connection").preload()
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")  # 0.2 s, once


def refusal() -> str:
    """Return why this process, or one forked from it, cannot train; or nothing."""
    import torch

    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if initialized or torch.cuda._is_in_bad_fork():  # noqa: SLF001  no public way to ask
        return "the import initialised CUDA, which a forked process cannot use"
    return ""


def main() -> int:
    """Be a worker, in a process that was forked and has its environment."""
    import numpy as np
    import torch

    from finetune_trainer.__main__ import main as work

    np.random.seed()  # noqa: NPY002  the global generator, which is the same in all that were forked
    wished = int(os.environ.get("OMP_NUM_THREADS", "1"))  # the library read it at the import
    torch.set_num_threads(
        min(wished, len(os.sched_getaffinity(0)))
    )  # a fresh process's library does not exceed that either
    return work()
