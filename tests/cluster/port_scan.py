"""In a network namespace of its own: a run on a Ray cluster of one machine, and every port of an address that
is not loopback. Prints the ports that answer, after those that answer while a control listens everywhere."""

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "e2e")]
from ray_daemons import Ray
from ray_jobs import await_step, submit

ADDRESS, STRANGER = "10.77.0.1", "10.77.0.2"
NUM_THREADS = 64


def main(folder: Path) -> None:
    with Ray() as ray:
        job = submit(ray, folder / "run", "optim.num_steps=1000000")
        await_step(folder / "run", 3, job)
        with socket.create_server(("0.0.0.0", 0)) as control:
            print(control.getsockname()[1], *answering())
        print(*answering())
        job.kill()


def answering() -> list[int]:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        ports = range(1, 2**16)
        return [port for port, open_there in zip(ports, pool.map(answers, ports, chunksize=64)) if open_there]


def answers(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(2)
        one.bind((STRANGER, 0))  # from the same address it could meet itself
        return one.connect_ex((ADDRESS, port)) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
