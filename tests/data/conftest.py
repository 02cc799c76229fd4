"""Ray for the tests of data."""

import pytest


@pytest.fixture(scope="session")
def _ray():
    """Two logical CPUs of this machine, or the cluster that another test's fixture has started."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def ray_here(_ray, request):
    _ray.cloudpickle.register_pickle_by_value(request.module)  # the workers cannot import this file
    return _ray
