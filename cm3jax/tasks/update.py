"""The update of a task as the compiler sees it: what training runs and what is compiled ahead of time are one thing."""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from cm3jax.parallel.agreement import Flags, agreed
from cm3jax.parallel.layout import check_layout
from cm3jax.parallel.specs import batch_sharding, shardings
from cm3jax.state import TrainState
from cm3jax.tasks.task import Batch, Metrics, Task

# What processes agree on beside every update: leave, save.
FLAGS = 2


def abstract_state(task: Task, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and shardings of the task's state on `mesh`; nothing is allocated.

    Raises:
      LayoutError: the mesh cannot hold it as the specs say.
    """
    shapes, specs = jax.eval_shape(task.init, jax.random.key(0)), task.state_specs()
    check_layout(mesh, shapes, specs)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings(mesh, specs))


def lower_update(task: Task, mesh: jax.sharding.Mesh, state: TrainState, **options: Any) -> jax.stages.Lowered:
    """`task.step` for states like `state` (arrays or shapes), the state donated, with the flags of all processes.

    The compiled function takes (state, global batch, flags [devices, FLAGS]) and gives (state, metrics, flags [FLAGS]).
    The flags ride along because a program of their own could run beside the update, and on CPUs the collectives of two
    programs at once may wait for each other for ever.

    Args:
      options: of `jax.jit`.
    """

    def update(
        state: TrainState, batch: Batch, flags: Bool[Array, "devices flags"]
    ) -> tuple[TrainState, Metrics, Bool[Array, " flags"]]:
        state, metrics = task.step(state, batch)
        return state, metrics, agreed(flags)

    layout = jax.tree.map(lambda a: a.sharding, state)
    rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
    batch = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for n, a in task.batch_shapes().items()}
    step = jax.jit(update, donate_argnums=0, out_shardings=(layout, whole, whole), **options)
    return step.lower(state, batch, Flags(mesh, FLAGS).shape)
