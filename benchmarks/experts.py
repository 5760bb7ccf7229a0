"""Grouped dispatch of experts against a loop over them: processor time of one layer's forward and backward.

    python benchmarks/experts.py [--rounds 9]

One rank, one thread, a Mixtral's router and experts. The contestants hold the same weights and work on the same tokens
in turn, the order turning round by round: the product's own `ExpertLayer`, a careful loop (rows sorted by expert once,
one product after another; twice, as A and A'), and transformers' own loop ("eager"). Outputs and all gradients are
compared first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import torch.nn.functional as F
from harness import run_ranks
from step_speed import print_head, row
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from cuboid.parallel.expert import Balance, ExpertLayer, Routing
from cuboid.parallel.layout import Layout
from cuboid.parallel.mesh import Block, connect, expert_mesh

NUM_EXPERTS, TOP_K, TOKENS = (8, 64), (2, 8), (512, 2048)
HIDDEN, INTERMEDIATE = 512, 256


def layer_of(num_experts: int, top_k: int, implementation: str) -> nn.Module:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8,
    )
    torch.manual_seed(0)  # the same weights in each
    return AutoModelForCausalLM.from_config(config, experts_implementation=implementation).model.layers[0]


def loop_over_experts(experts: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What `MixtralExperts` computes, one expert after another: x [N, D], chosen and weights [N, k]."""
    expert, k = chosen.flatten(), chosen.shape[1]
    order, counts = expert.argsort(), expert.bincount(minlength=experts.num_experts).tolist()
    computed = []
    parts = zip(x[order // k].split(counts), experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    for rows, gate_up, down in parts:
        gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
        computed.append(F.linear(experts.act_fn(gate) * up, down))
    places = x.new_empty(len(expert), x.shape[1]).index_copy(0, order, torch.cat(computed)).view(-1, k, x.shape[1])
    return (places * weights.unsqueeze(-1)).sum(1)


def contestants(num_experts: int, top_k: int, block: Block) -> list[nn.Module]:
    """The mixture of experts ``[1, N, D] -> [1, N, D]`` as cuboid, A, A' and transformers' loop."""
    ours, loop, again, eager = (layer_of(num_experts, top_k, name) for name in ("grouped_mm", *["eager"] * 3))
    for layer in (loop, again):
        layer.mlp.experts.forward = partial(loop_over_experts, layer.mlp.experts)
    mesh = expert_mesh(block)["expert"]
    routing = Routing(balance=Balance(), normalised=True, num_layers=1, tensor_group=block.mesh["tensor"].get_group())
    ExpertLayer(ours, 0, experts=ours.mlp.experts, router=ours.mlp.gate, mesh=mesh, routing=routing)
    return [layer.mlp for layer in (ours, loop, again, eager)]


def measure(num_experts: int, top_k: int, tokens: int, rounds: int) -> list[list[float]]:
    """CPU seconds of each round of each contestant."""
    with connect(Layout()) as block:
        modules = contestants(num_experts, top_k, block)
        generator = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(1, tokens, HIDDEN, generator=generator) for _ in range(2))
        compare_numbers([run(module, x, grad)[1] for module in modules])
        seconds: list[list[float]] = [[] for _ in modules]
        for turn in range(rounds):
            for place in (*range(turn % 4, 4), *range(turn % 4)):
                seconds[place].append(run(modules[place], x, grad)[0])
    return seconds


def run(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[float, dict[str, Tensor]]:
    """(CPU seconds of forward and backward, the output and every gradient)."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    began = time.process_time()
    output = module(x)
    output.backward(grad)
    seconds = time.process_time() - began
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return seconds, {"output": output.detach(), "input": x.grad, **gradients}


def compare_numbers(found: list[dict[str, Tensor]]) -> None:
    ours, *others = found
    for other in others:
        for name, value in ours.items():
            error = (other[name] - value).abs().max() / value.abs().max()
            assert error < 1e-5, (name, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    names, ratios = ("cuboid", "loop", "transformers' loop"), ("loop : cuboid", "A : A'", "transformers' loop : cuboid")
    print_head(["experts", "top k", "tokens", *(f"{name} ms" for name in names), *ratios])
    for size in product(NUM_EXPERTS, TOP_K, TOKENS):
        ours, loop, again, eager = run_ranks(measure, 1, *size, arguments.rounds, timeout=300)[0]
        cells = [f"{1e3 * statistics.median(each):.1f}" for each in (ours, loop, eager)]
        for first, second in ((loop, ours), (loop, again), (eager, ours)):
            cells.append(f"{statistics.median(a / b for a, b in zip(first, second, strict=True)):.2f}")
        print(row([*map(str, size), *cells]), flush=True)


if __name__ == "__main__":
    main()
