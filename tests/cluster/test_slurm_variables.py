"""What Slurm says of a task, in the words of torchrun; the daemons are in ``test_slurm.py``."""

import pytest

from sleeptrain.cluster import slurm

TASK = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "address_of", lambda host: f"address of {host}")
    assert slurm.num_tasks(TASK) == 4
    assert slurm.rank_variables(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "address of gpu07",
        "MASTER_PORT": "23456",
    }


def test_what_the_user_set_stays() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}
    assert slurm.rank_variables(TASK | given).items() >= given.items()


def test_a_batch_script_is_no_task() -> None:
    batch = {name: TASK[name] for name in TASK if "STEP" not in name}
    assert slurm.num_tasks(batch) is None
    assert slurm.num_tasks({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,5-6]-ib", "gpu3-ib"),
        ("a-b1,c[1-2]", "a-b1"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


@pytest.mark.parametrize(("counts", "expanded"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1])])
def test_tasks_per_node(counts: str, expanded: list[int]) -> None:
    assert slurm.expand(counts) == expanded


def test_a_host_that_slurm_does_not_know_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert slurm.address_of("gpu07") == "gpu07"
