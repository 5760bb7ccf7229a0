"""How a run goes: recipe, model, data, assembly, engine, loop, checkpoints, tracking."""

import logging

if __name__ != "cuboid.trainer":
    raise ImportError("this folder is the package cuboid.trainer; install the project (make install) and import that")

# Where torchao is installed transformers imports it, and each process would be told of the GPU kernels that this
# machine has not (torchao), and of how torchao declares its enums (torch).
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
