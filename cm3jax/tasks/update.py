"""The update of a task as the compiler sees it: what training runs and what is compiled ahead of time are one thing."""

from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.layout import check_layout
from cm3jax.parallel.specs import batch_sharding, shardings
from cm3jax.state import TrainState
from cm3jax.tasks.task import Task


def abstract_state(task: Task, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and shardings of the task's state on `mesh`; nothing is allocated.

    Raises:
      LayoutError: the mesh cannot hold it as the specs say.
    """
    shapes, specs = jax.eval_shape(task.init, jax.random.key(0)), task.state_specs()
    check_layout(mesh, shapes, specs)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings(mesh, specs))


def lower_update(task: Task, mesh: jax.sharding.Mesh, state: TrainState, **options: Any) -> jax.stages.Lowered:
    """`task.step` for states like `state` (arrays or shapes) and a global batch, the state donated.

    Args:
      options: of `jax.jit`.
    """
    layout = jax.tree.map(lambda a: a.sharding, state)
    rows = batch_sharding(mesh)
    batch = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for n, a in task.batch_shapes().items()}
    step = jax.jit(task.step, donate_argnums=0, out_shardings=(layout, NamedSharding(mesh, P())), **options)
    return step.lower(state, batch)
