"""Where ranks find room on a cluster's nodes, and which of its workers is which rank. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cuboid.parallel.errors import UserError, one_of
from cuboid.parallel.layout import Layout


def rank_bundle(
    nodes: Sequence[Mapping[str, float]], ranks: int, *, tensor: int, gpu: bool, share_cpus: bool = True
) -> dict[str, float] | None:
    """The resources to reserve for each rank so that all find room; None where there is none.

    Args:
        nodes: total resources of each node, as ``{"CPU": 8.0, "GPU": 4.0}``.
        ranks: how many are to be seated.
        tensor: ranks that must share a node.
        gpu: each rank takes a GPU too.
        share_cpus: ranks may outnumber CPUs and take a share of one.
    """

    def seats(share: float, node: Mapping[str, float]) -> int:
        by_cpu = int(node.get("CPU", 0) / share)
        return min(by_cpu, int(node.get("GPU", 0))) if gpu else by_cpu

    divided = {node["CPU"] / (tensor * groups) for node in nodes if node.get("CPU") for groups in range(1, ranks + 1)}
    # Ray counts in ten-thousandths.
    least = 0.001 if share_cpus else 1.0
    shares = [1.0, *(int(share * 10_000) / 10_000 for share in divided if share >= least)]
    fitting = [share for share in shares if sum(seats(share, node) for node in nodes) >= ranks]
    tidy = [share for share in fitting if not any(seats(share, node) % tensor for node in nodes)]
    best = tidy or fitting
    if not best:
        return None
    return {"CPU": 1.0 if 1.0 in best else max(best)} | ({"GPU": 1.0} if gpu else {})


def rank_order(nodes: Sequence[object], tensor: int) -> list[int]:
    """For each worker, in the order in which Ray hands them out, its rank: a node's workers take neighbouring ranks.

    Args:
        nodes: the node that each worker runs on.
        tensor: neighbouring ranks that must share a node.

    Raises:
        UserError: the nodes' workers cannot be grouped so.
    """
    by_node: dict[object, list[int]] = {}
    for index, node in enumerate(nodes):
        by_node.setdefault(node, []).append(index)
    counts = [len(workers) for workers in by_node.values()]
    if any(count % tensor for count in counts):
        raise UserError(
            f"parallel.tensor={tensor} needs {tensor} ranks together on a node, but the cluster's nodes took "
            f"{', '.join(map(str, counts))}; use a tensor that divides these, or nodes with more room"
        )
    ranks = [0] * len(nodes)
    for rank, index in enumerate(index for workers in by_node.values() for index in workers):
        ranks[index] = rank
    return ranks


def ranks_per_node(layout: Layout, num_nodes: int) -> int:
    """How many ranks each of equal nodes takes, so that tensor ranks share one.

    Raises:
        UserError: they cannot be shared out evenly; with the numbers of nodes that would do.
    """
    ranks, tensor = layout.world_size, layout.tensor
    fitting = [number for number in range(1, ranks + 1) if ranks % (number * tensor) == 0]
    if num_nodes not in fitting:
        constraint = f"{ranks} ranks, of which {tensor} (parallel.tensor) stay together, do not divide by that"
        raise UserError(f"{num_nodes} nodes: {constraint}; use {one_of(fitting)}")
    return ranks // num_nodes


def told_resources(nodes: Sequence[Mapping[str, float]]) -> str:
    """``4 CPUs and 2 GPUs on 2 nodes``."""
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    amounts = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    return f"{amounts} on {len(nodes)} nodes" if len(nodes) > 1 else amounts
