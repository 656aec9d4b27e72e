"""Meshes divide the devices, or say why they cannot; unknown logical axes are never silently unsplit."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.core import sharding
from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh


def test_the_rest_is_worked_out():
    assert {axis: n for axis, n in Mesh(fsdp=2, tensor=2).shape(8).items() if n > 1} == {"data": 2, "fsdp": 2, "tensor": 2}
    assert {axis: n for axis, n in Mesh(data=2, fsdp=-1).build().shape.items() if n > 1} == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("members, population, data", [(1, 1, 8), (2, 2, 4), (3, 3, 2), (4, 4, 2), (7, 7, 1), (24, 8, 1)])
def test_trials_get_the_devices_that_are_free(members, population, data):
    mesh = Mesh().for_population(members, 8, rows=16)
    assert (mesh.population, mesh.data) == (population, data)
    assert mesh.build(jax.devices()).size == population * data


@pytest.mark.parametrize("open_axis", [Mesh(), Mesh(data=1, fsdp=-1), Mesh(data=2, fsdp=-1, tensor=1), Mesh(data=1, tensor=-1)])
def test_any_number_of_devices_serves_any_number_of_trials(open_axis):
    for devices in range(2, 130, 2):
        alone = open_axis.for_population(1, devices, rows=16)
        for members in (1, 3, 4, 8, 24):
            mesh = open_axis.for_population(members, devices, rows=16)
            used = mesh.population * mesh.data * mesh.fsdp * mesh.tensor
            assert used <= devices and 16 % (mesh.data * mesh.fsdp) == 0 and mesh.population <= members
            assert (alone.data * alone.fsdp) % (mesh.data * mesh.fsdp) == 0, "batches for scoring fit every group"


@pytest.mark.parametrize(
    "mesh, sentence",
    [
        (Mesh(tensor=3), "mesh tensor=3 does not divide 8 devices"),
        (Mesh(data=2, tensor=2), "mesh data=2 × tensor=2 needs 4 devices, but there are 8"),
    ],
)
def test_what_does_not_divide_is_refused(mesh, sentence):
    with pytest.raises(ConfigError) as error:
        mesh.shape(8)
    assert sentence in str(error.value)


def test_only_one_axis_takes_the_rest():
    with pytest.raises(ConfigError, match="fsdp is -1, but so is data"):
        Mesh(data=-1, fsdp=-1)


def test_an_unknown_axis_is_an_error_even_without_a_mesh():
    with pytest.raises(ValueError, match="the names are"):
        sharding.constrain(jnp.zeros((2, 2)), "batch", "lenght")
    with pytest.raises(ValueError, match="unknown logical axes"):
        sharding.partitioned(jax.nn.initializers.zeros, ("embedd",))
