"""Trains the model on packed sequences with two processes of one thread each.

Run: ``python -m bench.tiny_moe.train --data DIR --output DIR [--shape NAME] [--steps N] [--decay-steps N]
[--processes N] [--seed N]``. A run that stopped goes on from its last checkpoint, also with other steps as long as
their decay has not begun. The schedule follows steps, not the clock, so a run can be repeated.
"""

import argparse
import json
import multiprocessing as mp
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.tiny_moe.model import SHAPES, TinyMoe
from bench.tiny_moe.muon import Muon
from bench.tiny_moe.next_token_loss import next_token_loss

# Sequences of one step by stream; each process takes every second one.
MIXTURE = {
    "tools_chat": 3,
    "arithmetic_chat": 3,
    "code_text": 3,
    "prose_text": 2,
    "german_text": 2,
    "code_chat": 1,
    "prose_chat": 1,
    "german_chat": 1,
}
BALANCE_COEFFICIENT = 0.03
MUON_LEARNING_RATE = 0.02
ADAM_LEARNING_RATE = 0.003
NUM_STEPS, DECAY_STEPS = 1480, 279
GRADIENT_NORM_LIMIT = 1.0
LOG_EVERY, CHECKPOINT_EVERY = 20, 20

# Shares of the peak rate at steps (counted from 1), linear in between.
Schedule = tuple[tuple[float, float], ...]


def schedule_of(num_steps: int, decay_steps: int = DECAY_STEPS) -> Schedule:
    """Gives warm-up, constant rate, and a decay to zero whose first 100 of 279 parts end at 75 %."""
    first, middle = num_steps - decay_steps, num_steps - decay_steps * 179 / 279
    return (0, 0.0), (40, 1.0), (first, 1.0), (middle, 0.75), (num_steps + 1, 0.0)


class Streams:
    """The packed sequences, each stream shuffled anew for every pass over it.

    Args:
        folder: Folder with ``<stream>.npz`` of ``data.py``.
        seed: Seed of the order.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._seed = seed
        self._arrays = {name: np.load(folder / f"{name}.npz") for name in MIXTURE}
        self._tokens = {name: array["tokens"] for name, array in self._arrays.items()}
        self._weights = {name: array["weights"] for name, array in self._arrays.items()}
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        self.taken: Counter[str] = Counter()

    def take(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Gives the next sequence of a stream with the weights of its tokens."""
        tokens, weights = self._tokens[name], self._weights[name]
        epoch, place = divmod(self.taken[name], len(tokens))
        if self._orders.get(name, (-1, None))[0] != epoch:
            self._orders[name] = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(tokens)))
        self.taken[name] += 1
        index = self._orders[name][1][place]
        return tokens[index], weights[index]

    def batch(self, step: int, rank: int, num_processes: int) -> tuple[list[str], Tensor, Tensor]:
        """Gives this process's share of a step: names of the streams, tokens and weights ``[B, T]``."""
        names = [name for name, count in MIXTURE.items() for _ in range(count)]
        rows = [self.take(name) for name in names]
        mine = slice((rank + step) % num_processes, None, num_processes)
        tokens = torch.from_numpy(np.stack([row[0] for row in rows[mine]]).astype(np.int64))
        weights = torch.from_numpy(np.stack([row[1] for row in rows[mine]]).astype(np.float32))
        return names[mine], tokens, weights


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """Gives the share of the peak rate at a step counted from 0."""
    steps, factors = zip(*schedule, strict=True)
    return float(np.interp(step + 1, steps, factors))


def optimisers(model: TinyMoe) -> list[torch.optim.Optimizer]:
    """Gives Muon for the matrices and Adam for the embedding, the routers and the norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embedding" not in name and "router" not in name
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.Adam(others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-10)
    return [Muon(matrices, lr=MUON_LEARNING_RATE), adam]


def _average_gradients(model: TinyMoe) -> None:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    flat *= min(1.0, GRADIENT_NORM_LIMIT / (float(flat.norm()) + 1e-6))
    for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _save(path: Path, content: dict[str, object]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


@dataclass(frozen=True, slots=True)
class Run:
    """What is trained: files, shape of the model, steps and how many of them decay, processes and seed."""

    data: Path
    output: Path
    shape: str
    num_steps: int
    decay_steps: int
    num_processes: int
    seed: int


def train(rank: int, run: Run) -> None:
    """Runs one of the processes."""
    output, schedule = run.output, schedule_of(run.num_steps, run.decay_steps)
    torch.set_num_threads(1)
    meeting = f"file://{output.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.num_processes)
    torch.manual_seed(run.seed)
    model = TinyMoe(SHAPES[run.shape])
    steppers = optimisers(model)
    peaks = [group["lr"] for stepper in steppers for group in stepper.param_groups]
    streams = Streams(run.data, run.seed)
    first_step, elapsed = 0, 0.0
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        for stepper, state in zip(steppers, saved["optimisers"], strict=True):
            stepper.load_state_dict(state)
        first_step, streams.taken, elapsed = saved["step"], saved["taken"], saved["seconds"]
    start = time.monotonic() - elapsed
    losses: dict[str, list[float]] = defaultdict(list)
    for step in range(first_step, run.num_steps):
        factor = learning_rate_factor(step, schedule)
        groups = [group for stepper in steppers for group in stepper.param_groups]
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * factor
        names, tokens_BT, weights_BT = streams.batch(step, rank, run.num_processes)
        result = model(tokens_BT)
        hidden = result.hidden_NH.view(*tokens_BT.shape, -1)[:, :-1].flatten(0, 1)
        loss, losses_N = next_token_loss(
            hidden, model.embedding_VH, tokens_BT[:, 1:].flatten(), weights_BT[:, 1:].flatten()
        )
        (loss + BALANCE_COEFFICIENT * result.balance_loss).backward()
        _average_gradients(model)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        for name, value in zip(names, losses_N.view(len(names), -1).mean(1).tolist(), strict=True):
            losses[name].append(value)
        if rank == 0 and (step + 1) % LOG_EVERY == 0:
            record: dict[str, object] = {
                "step": step + 1,
                "tokens": (step + 1) * sum(MIXTURE.values()) * tokens_BT.shape[1],
            }
            record |= {"seconds": round(time.monotonic() - start, 1), "rate_factor": round(factor, 4)}
            record |= {"balance": round(result.balance_loss.item(), 4)}
            record |= {"losses": {name: round(float(np.mean(values)), 4) for name, values in losses.items()}}
            with (output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            losses.clear()
        if rank == 0 and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == run.num_steps):
            content: dict[str, object] = {
                "model": model.state_dict(),
                "optimisers": [stepper.state_dict() for stepper in steppers],
            }
            content |= {
                "step": step + 1,
                "shape": run.shape,
                "schedule": schedule,
                "seed": run.seed,
                "taken": streams.taken,
            }
            _save(checkpoint, content | {"seconds": time.monotonic() - start})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Starts the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="top-2-of-32")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--decay-steps", type=int, default=DECAY_STEPS, help="Steps over which the rate falls to 0.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "meeting").unlink(missing_ok=True)
    context = mp.get_context("spawn")
    run = Run(
        arguments.data,
        arguments.output,
        arguments.shape,
        arguments.steps,
        arguments.decay_steps,
        arguments.processes,
        arguments.seed,
    )
    processes = [context.Process(target=train, args=(rank, run)) for rank in range(run.num_processes)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a training process failed; its message is above")


if __name__ == "__main__":
    main()
