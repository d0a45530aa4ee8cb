import threading
import time

import pytest
import torch

from cryoalign.runtime.threads import map_in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_outcomes_come_in_order_and_items_are_not_taken_far_ahead(workers: int) -> None:
    taken, running, most = [], [], []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    def slow(i: int) -> int:
        running.append(i)
        most.append(len(running))
        time.sleep(0.01 if i % 3 else 0.03)  # later ones overtake
        running.remove(i)
        return i * i

    for i, outcome in enumerate(map_in_order(slow, items(), workers)):
        assert outcome == i * i
        assert len(taken) <= i + workers + 2
    assert i == 19
    assert max(most) <= workers
    assert workers == 1 or max(most) > 1


def test_each_worker_has_one_thread_and_the_caller_gets_its_own_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = list(map_in_order(lambda _: torch.get_num_threads(), range(6), 2))
        assert found == [1] * 6
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_that_overlap_get_their_own_numbers_back() -> None:
    """A enters, B enters, A leaves, B leaves."""
    before = torch.get_num_threads()
    ready, entered, inside, left = (threading.Event() for _ in range(4))
    after = {}

    def first() -> None:
        torch.set_num_threads(3)
        assert torch.get_num_threads() == 3
        outcomes = map_in_order(str, range(3), 2)
        next(outcomes)
        entered.set()
        assert inside.wait(10)
        list(outcomes)
        after["first"] = torch.get_num_threads()
        left.set()

    def second() -> None:
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2
        ready.set()
        assert entered.wait(10)
        outcomes = map_in_order(str, range(3), 2)
        next(outcomes)
        inside.set()
        assert left.wait(10)
        list(outcomes)
        after["second"] = torch.get_num_threads()

    try:
        threads = [threading.Thread(target=second), threading.Thread(target=first)]
        threads[0].start()
        assert ready.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert after == {"first": 3, "second": 2}


def test_interleaved_in_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        one, two = (map_in_order(str, range(3), 2) for _ in range(2))
        next(one), next(two)
        list(one)
        assert torch.get_num_threads() == 1  # the other still computes
        list(two)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_ends_the_rest() -> None:
    done = []

    def fail(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        done.append(i)
        return i

    with pytest.raises(ValueError, match="three"):
        list(map_in_order(fail, range(1000), 2))
    assert len(done) < 20
    assert threading.active_count() < 10
