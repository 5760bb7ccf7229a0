"""make finetune: what a model answers to held-out prompts, and what it answers once it is tuned.

    python recipes/compare_answers.py MODEL TUNED CONVERSATIONS [--number 3]

TUNED is an export of the run, a model or an adapter, loaded as its users do it, by transformers and by peft.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

LONGEST_PROMPT = 600
"""Characters: what fits on a screen."""
NEW_TOKENS = 60


def prompts(path: Path, number: int) -> list[tuple[str, str]]:
    """(what the user asks, what the file answers) of conversations spread over the file, each of another module."""
    found, modules = [], set()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        asked, answered = (message["content"] for message in row["messages"])
        if row["module"] not in modules and len(asked) < LONGEST_PROMPT:
            modules.add(row["module"])
            found.append((asked, answered))
    step = max(1, len(found) // number)
    return found[::step][:number]


def tuned(model: Any, folder: Path) -> Any:
    """The model of ``folder``, or ``model`` with the adapter that is there."""
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The most likely answer, cut after `NEW_TOKENS`."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--number", type=int, default=3)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # torchao, which peft imports, tells of kernels for GPUs
    warnings.simplefilter("ignore", FutureWarning)  # peft reads names that transformers will drop
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, trust_remote_code=False).eval()
    asked = prompts(arguments.conversations, arguments.number)
    before = [answer(model, tokenizer, prompt) for prompt, _ in asked]
    after = tuned(model, arguments.tuned)
    for (prompt, wanted), first in zip(asked, before, strict=True):
        print(f"{'-' * 80}\n{prompt}\n")
        for words, text in (("held out", wanted), ("before", first), ("after", answer(after, tokenizer, prompt))):
            print(f"{words}:\n    " + text.replace("\n", "\n    "))


if __name__ == "__main__":
    main()
