"""All checks before a long run, in the order in which one depends on the others: machines, devices, links."""

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.perf import host_checks, links, rates
from cm3jax.perf.findings import Finding, everyones, host
from cm3jax.reliability.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What still counts as good.

    Attributes:
      seconds: for one check; then the process ends itself.
      clock_seconds: difference of a clock to that of the first process.
      free_bytes: room in the work directory.
      slow_share: of the median matrix product rate, below which a device is slow.
      link_share: of the rate of all links of a device, below which an all-reduce is slow. Low, because an axis may use
        one pair of links only; it finds traffic that does not take the links at all.
    """

    seconds: float = 300.0
    clock_seconds: float = 1.0
    free_bytes: float = 20e9
    slow_share: float = 0.9
    link_share: float = 0.05


def preflight(workdir: Path, mesh: MeshConfig, limits: Limits) -> list[Finding]:
    """The findings of all checks; every process of a run calls this, and all get the same.

    Raises:
      BarrierError: a process did not take part in a check in time.
    """
    stacks = Path(tempfile.gettempdir()) / f"cm3-preflight-stacks-{jax.process_index()}.txt"
    findings = []
    with Watchdog(stacks) as watchdog:
        watchdog.expect("the names of all machines", limits.seconds)
        hosts = everyones(host(), "the names of all machines", limits.seconds)
        for name, check in _checks(workdir, mesh, limits, hosts):
            if jax.process_index() == 0:
                logger.info("checking %s", name)
            watchdog.expect(name, limits.seconds)
            found = check()
            findings += found if isinstance(found, list) else [found]
    return findings


def _checks(
    workdir: Path, config: MeshConfig, limits: Limits, hosts: list[str]
) -> Iterator[tuple[str, Callable[[], Finding | list[Finding]]]]:
    seconds = limits.seconds
    yield "versions", lambda: host_checks.check_versions(hosts, seconds)
    yield "clocks", lambda: host_checks.check_clocks(hosts, seconds, limits.clock_seconds)
    yield "the work directory", lambda: host_checks.check_storage(workdir, hosts, seconds, limits.free_bytes)
    yield "devices", lambda: rates.check_devices(hosts, seconds)
    yield "matrix products", lambda: rates.check_matmul(hosts, seconds, limits.slow_share)
    try:
        mesh = make_mesh(config)
    except ValueError as error:
        problem = str(error)
        yield "the mesh", lambda: Finding("mesh", False, problem)
        return
    for axis in links.axes_of(mesh):
        yield (
            f"all-reduce over {axis}",
            lambda axis=axis: links.check_axis(mesh, axis, hosts, seconds, limits.link_share),  # type: ignore[misc]
        )
