"""Ranks as torchrun starts them, by forking: a fresh interpreter would spend its time importing torch."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch


def forked(count: int, work: Callable[[], None], timeout_s: float = 100) -> list[int]:
    """Run `work` in `count` processes with torchrun's environment; their exit codes (-9: killed). The caller
    must hold no process group, and autograd's threads do not survive a fork: nothing may train.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        work()

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=start, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]
