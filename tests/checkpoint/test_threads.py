import threading

import pytest

from sleeptrain.checkpoint.threads import run_all


@pytest.mark.parametrize("num_threads", [1, 3, 50])
def test_every_job_is_done_once(num_threads):
    done = []
    run_all([lambda i=i: done.append(i) for i in range(20)], num_threads)
    run_all([], num_threads)
    assert sorted(done) == list(range(20))


def test_jobs_run_at_the_same_time():
    meeting = threading.Barrier(3, timeout=60)
    run_all([meeting.wait] * 3, 3)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("error", [IndexError, ValueError])
def test_the_first_error_is_raised_and_nothing_is_begun_after_it(num_threads, error):
    done, failed = [], threading.Event()

    def fail():
        failed.set()
        raise error("broken")

    jobs = [fail, *[lambda: (failed.wait(), done.append(1))] * 1000]
    with pytest.raises(error, match="broken"):
        run_all(jobs, num_threads)
    assert len(done) < 1000
