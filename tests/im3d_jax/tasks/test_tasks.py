"""Tasks by name: ours, and those of a user's module."""

import pytest
from ml_collections import ConfigDict

from im3d_jax import sharding, tasks
from recon_torch.errors import UserError

USERS = """
    from im3d_jax import checkpoint

    class Constant:
        partition_rules, constants = (), ()

        def __init__(self, value):
            self.value = value

        def init(self, key):
            return {"value": self.value}

        def load(self, path):
            return checkpoint.load_weights(path, self.init(None))[0]

        def stream(self, name):
            return name

        def collate(self, examples):
            return [example["id"] for example in examples]

        def draw(self, key, num_examples, stream):
            return ()

        def loss(self, params, constants, batch, draws, stream):
            return params["value"], {}

        def flops(self, trains, num_examples, num_views):
            return 0.0

        def sample(self, params, key):
            return {}

        def save(self, directory, params, metadata):
            return directory

    def build(config, mesh):
        return Constant(config.train.value)
"""


def config(name):
    return ConfigDict({"train": {"task": name, "value": 3.0}})


def test_a_users_task_is_built_by_the_name_of_its_module(user_module):
    task = tasks.build(config(user_module(USERS)), sharding.make_mesh())
    assert isinstance(task, tasks.Task) and task.init(None) == {"value": 3.0}


@pytest.mark.parametrize("shipped", ["tiny_turntable.py", "autoencoder_tiny.py"])
def test_our_tasks_satisfy_the_contract(shipped, shrunk):
    from im3d_jax import config_flags

    small = shrunk() if shipped == "tiny_turntable.py" else config_flags.load(f"configs/{shipped}")
    assert isinstance(tasks.build(small, sharding.make_mesh()), tasks.Task)


def test_mistakes_are_one_line(user_module):
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match="config.train.task: no 'turntables'; did you mean 'turntable'"):
        tasks.build(config("turntables"), mesh)
    lacking = user_module(USERS.replace("def draw", "def roll").replace("def save", "def keep"))
    with pytest.raises(UserError, match="user_pkg.part lacks draw, save of the Task contract"):
        tasks.build(config(lacking), mesh)
    without = user_module(USERS.replace("def build", "def make"))
    with pytest.raises(UserError, match="user_pkg.part has no build, which its contract asks for"):
        tasks.build(config(without), mesh)
