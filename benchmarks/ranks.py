"""What several processes gain that train together, and the bytes that they exchange in a step.

    python benchmarks/ranks.py

Batches a second of a small SD3, by one process of one thread and by two, in turn; on a machine with two idle cores or
more. The bytes are counted where Train ControlNeXt hands its gradients to torch.distributed, on tensors without data at
the released sizes, beside the gradients of a ControlNet's training, in float32 as it is trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import harness

BATCH = 8
RANKS = (1, 2)
COUNTED = ("SDXL", "Flux.1 dev, 1024x1024, bf16", "Wan")
MB = 2 ** 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each training (default: 30)")
    parser.add_argument("--rounds", type=int, default=5, help="trainings with each number of processes (default: 5)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # in a process that torchrun started
    return parser.parse_args()


def timed(ranks: int, steps: int) -> float:
    """Batches a second of so many processes that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__,
               "--rank", "--steps", str(steps)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def as_rank(steps: int) -> None:
    """Train as one of the processes; the first one prints the batches a second of all."""
    import torch
    import torch.distributed as distributed
    from models import small_sd3
    from sampling import cond
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    pack, model = harness.Pack(), small_sd3()
    numbers = torch.Generator().manual_seed(0)
    latents, images = torch.randn(64, 16, 12, 12, generator=numbers), torch.rand(64, 96, 96, 3, generator=numbers)
    samples = pack.module("nodes.training.data").samples_for(model, [{"samples": latents}], [cond(model, tokens=77)],
                                                             [images])
    settings = pack.module("nodes.training.settings").TrainSettings(
        batch_size=BATCH, training_dtype="fp32", gradient_checkpointing=False)
    ranks = pack.module("controlnext_core.ranks").Ranks()

    with pack.module("nodes.training.session").Session(model, samples, settings, ranks=ranks) as session:
        session.step()
        ranks.wait_for_all()
        start = time.perf_counter()
        for _ in range(steps):
            session.step()
        ranks.wait_for_all()
        seconds = time.perf_counter() - start
    if ranks.leads:
        print(json.dumps(ranks.count * steps / seconds), flush=True)
    distributed.destroy_process_group()


def exchanged(pack) -> dict[str, tuple[int, int]]:
    """{model: (bytes that are averaged in a step of Train ControlNeXt, in one of a ControlNet)}."""
    import torch.distributed as distributed
    import training_memory
    training_memory.go_without_data()
    ranks = pack.module("controlnext_core.ranks").Ranks()
    ranks.count, given, found = 2, [], {}
    all_reduce, distributed.all_reduce = distributed.all_reduce, lambda tensor: given.append(tensor.nbytes)

    for case in training_memory.cases():
        if not case.name.startswith(COUNTED):
            continue
        given.clear()
        with training_memory.session_of(case, pack, ranks) as session:
            training_memory.give_moments(session.training.optimizer)
            with training_memory.meter_class()():
                session.step()
        trained = training_memory.native_of(case, pack).trained
        found[case.name.split(",")[0]] = sum(given), sum(parameter.nbytes for parameter in trained)
    distributed.all_reduce = all_reduce
    return found


def main() -> None:
    arguments = parse_arguments()
    harness.enter()
    if arguments.rank:
        return as_rank(arguments.steps)
    rates = {ranks: [] for ranks in RANKS}
    for number in range(arguments.rounds):
        for ranks in RANKS:
            rates[ranks].append(timed(ranks, arguments.steps))
        print(f"Round {number + 1} of {arguments.rounds}: " + ", ".join(
            f"{found[-1]:.2f} batches a second with {ranks}" for ranks, found in rates.items()), flush=True)
    medians = {ranks: statistics.median(found) for ranks, found in rates.items()}
    sizes = exchanged(harness.Pack())

    rows = [[f"batches a second, {ranks} {'process' if ranks == 1 else 'processes'}",
             f"{median:.2f}, {median / medians[1]:.2f} times"] for ranks, median in medians.items()]
    rows += [[f"exchanged in a step, {name}", f"{ours / MB:.0f} MB, a ControlNet {native / MB:.0f} MB"]
             for name, (ours, native) in sizes.items()]
    harness.report("ranks", f"Several processes that train together, batches of {BATCH}", ["", ""], rows,
                   {"batches_a_second": rates, "exchanged": sizes})


if __name__ == "__main__":
    main()
