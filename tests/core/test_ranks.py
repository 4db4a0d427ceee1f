"""Several processes that train together, by torch.distributed's gloo: as one process with as many batches a step."""

import functools

import pytest
import torch
import torch.multiprocessing as multiprocessing
from toy_training import failed, in_process, trained

STEPS = 20


def together(count: int, work, folder) -> list:
    """What the function gives in each of so many processes."""
    multiprocessing.start_processes(in_process, (count, work, str(folder)), count, start_method="fork")
    return [torch.load(f"{folder}/of_{count}_{rank}.pt", weights_only=True) for rank in range(count)]


def distance(ours: dict, expected: dict) -> float:
    """Relative L2 distance of all that two states have learned."""
    parts = [torch.cat([value.flatten() for entry in ("module", "differences") for value in state[entry].values()])
             for state in (ours, expected)]
    return float((parts[0] - parts[1]).norm() / parts[1].norm())


@pytest.mark.parametrize("count", [2, 3])
def test_so_many_ranks_learn_what_one_process_learns_from_as_many_batches_a_step(tmp_path, count):
    ranks = together(count, functools.partial(trained, STEPS), tmp_path)
    alone = trained(STEPS, accumulation=count)
    assert all(distance(state, alone) <= 1e-6 for state in ranks)
    assert all(distance(state, ranks[0]) == 0.0 for state in ranks)
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert distance(trained(STEPS), alone) > 1e-3, "a step of one batch is another one"


def test_a_state_of_some_ranks_goes_on_with_others(tmp_path):
    state = together(2, functools.partial(trained, STEPS // 2), tmp_path)[1]
    alone = trained(STEPS, accumulation=2)
    assert distance(trained(STEPS, state, accumulation=2), alone) <= 1e-6
    three = together(3, functools.partial(trained, STEPS, state), tmp_path)[0]
    assert distance(three, trained(STEPS, state, accumulation=3)) <= 1e-6


def test_a_loss_that_is_no_number_in_one_rank_ends_the_step_in_all(tmp_path):
    for message, step in together(2, failed, tmp_path):
        assert message.startswith("learning_rate: the loss is nan after 0 steps") and step == 0
