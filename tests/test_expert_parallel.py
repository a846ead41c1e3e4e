"""Experts over two processes on the CPU: what one process with all experts gives, gradients included."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from vllm_accel import fused_moe

ROOT = Path(__file__).parents[1]

_WORKER = """
import sys
import torch
import torch.distributed as dist
from vllm_accel.distributed.experts import expert_parallel_moe, expert_range
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=2)
given = torch.load(path)
own = expert_range(5)
assert (own.start, own.stop) == ((0, 3), (3, 5))[rank]
mine = slice(0, 19) if rank == 0 else slice(19, None)  # uneven numbers of tokens
x = given["x"][mine].clone().requires_grad_()
up, down = (given[n][own.start : own.stop].clone().requires_grad_() for n in ("w_gate_up", "w_down"))
weights, ids = given["topk_weights"][mine].clone().requires_grad_(), given["topk_ids"][mine]
found = []
for case in range(2):
    out = expert_parallel_moe(x, up, down, weights, ids, num_experts=5)
    grads = torch.autograd.grad(out, (x, up, down, weights), given["dout"][mine])
    found.append((out.detach(), *grads))
    ids = torch.zeros_like(ids)  # then: all tokens to the first rank
try:
    expert_parallel_moe(x, up[:1], down[:1], weights, ids, num_experts=5)
except ValueError as error:
    assert f"this rank holds experts {own.start}..{own.stop - 1} of 5" in str(error)
empty = expert_parallel_moe(x[: 5 * rank], up, down, weights[: 5 * rank], ids[: 5 * rank], num_experts=5)
assert empty.shape == (5 * rank, 16)
torch.save(found, f"{path}.{rank}")
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    given = {
        "x": torch.randn(24, 16, generator=g), "w_gate_up": torch.randn(5, 16, 24, generator=g) / 4,
        "w_down": torch.randn(5, 12, 16, generator=g) / 4, "topk_weights": torch.rand(24, 2, generator=g),
        "topk_ids": torch.randint(0, 6, (24, 2), generator=g), "dout": torch.randn(24, 16, generator=g),
    }  # fmt: skip
    assert (given["topk_ids"] == 5).any()  # nobody's pairs travel nowhere
    path = tmp_path / "given.pt"
    torch.save(given, path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", _WORKER]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen([*command, str(rank), str(path), where], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    parts = [torch.load(f"{path}.{rank}") for rank in range(2)]
    leaves = [given[n].requires_grad_() for n in ("x", "w_gate_up", "w_down", "topk_weights")]
    for case, ids in enumerate((given["topk_ids"], torch.zeros_like(given["topk_ids"]))):
        out = fused_moe(*leaves, ids)
        want = (out.detach(), *torch.autograd.grad(out, leaves, given["dout"]))
        (a, b) = (part[case] for part in parts)
        for index, ref in enumerate(want):
            assert (torch.cat([a[index], b[index]]) - ref).abs().max() < 1e-5
