import pytest

from exchange_jobs import workers
from exchange_jobs.launch import launch
from shared_job import run_once


# One job for many checks: starting processes costs more than most of them.
@pytest.fixture(scope="session")
def exchange_job(tmp_path_factory):
    """What every rank of one job of four returned, by check."""
    return run_once(tmp_path_factory, "exchange", lambda: launch(workers.all_checks, 4, limit=900.0))


@pytest.fixture(scope="session")
def later_job(tmp_path_factory):
    """What every rank found for the modes in `LATER`."""
    return run_once(tmp_path_factory, "combinations", lambda: launch(workers.combinations, 4, limit=900.0))
