"""Keeps back what libraries log that a user can't act on. Imported for its effect, before transformers is."""

import logging
import os
import sys

# Where torchao is installed, importing transformers logs what only its developers can act on.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "Enum subclass" not in record.getMessage())
logging.getLogger("torchao").addFilter(  # its kernels for GPUs, which can't be loaded where there is none
    lambda record: "Failed to load" not in record.getMessage() or sys.modules["torch"].cuda.is_available()
)
# peft imports it, and on a CPU it misses a kernel of another package, which nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
