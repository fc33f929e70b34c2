import pytest


@pytest.fixture(autouse=True)
def _threads_as_before(same_threads: None) -> None:
    """`train` sets the number of threads that its recipe names."""
