"""Batches of a step done by Ray actors, each of which holds the model, on this machine or many.

Ray Data runs them: it streams, keeps the order, holds back what is read while the actors are busy, and starts actors
anew that were lost with their machine. Every dataset that it makes starts actors of its own, so the whole step is one
dataset: a single task on this machine reads the input, and each batch is a block of its own (Ray Data joins small
blocks otherwise, and an actor takes a whole one). A block that was lost is read and done again, to the same rows.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from po.errors import POError, UserError
from po.prep.batches import Batches
from po.prep.step import BatchWork, Outcome


@dataclass(frozen=True)
class OnRay:
    """A pool for run_step. `build` loads the model and gives the work on a batch; each actor calls it once."""

    build: Callable[[], BatchWork]
    actors: int
    gpus: float | None = None  # of each actor; None: one where the cluster has any
    address: str | None = None  # of a cluster; None: a Ray of its own, on this machine alone

    def __call__(self, batches: Batches) -> Generator[Sequence[Outcome], None, None]:
        """The outcomes of all batches, in their order. Raises UserError where Ray is not installed or not found."""
        ray = _started(self.address)
        try:
            done = _dataset(batches, self).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for cell in (cell for table in done for cell in table["done"]):
                result = pickle.loads(cell.as_py())
                if isinstance(result, POError):
                    raise result
                yield result
        finally:
            ray.shutdown()


def _started(address: str | None) -> Any:
    """Ray, connected. It neither reports usage nor prints what its own parts have to say."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise UserError(f"--ray: Ray Data is not installed ({e}); pip install 'po[ray]'") from e
    _reach(address)
    here: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, ValueError, RuntimeError) as e:
        token = "is Ray running there, and RAY_AUTH_MODE=token set here, with its token in ~/.ray/auth_token?"
        raise UserError(f"--ray-address {address}: no connection to a Ray cluster ({e}); {token}") from e
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")  # it counts reading tasks: one
    return ray


def _reach(address: str | None) -> None:
    """Raises UserError where nobody listens at host:port; Ray itself would try for minutes and end the process."""
    if address is not None and address.startswith("ray://"):
        raise UserError(f"--ray-address {address}: run the script on a machine of the cluster, with auto or host:port")
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit():
        return  # auto and the like
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as e:
        raise UserError(f"--ray-address {address}: nobody answers there ({e}); start Ray with `ray start`") from e


def _gpus(how: OnRay) -> float:
    import ray

    there = float(ray.cluster_resources().get("GPU", 0))
    if how.address is None and how.gpus is not None and how.gpus > there:
        raise UserError(f"--ray-gpus {how.gpus:g}: this machine has {there:g}")
    return min(there, 1.0) if how.gpus is None else how.gpus


def _dataset(batches: Batches, how: OnRay) -> Any:
    """Reading and work as one dataset of two columns of bytes: records come as they are, whatever their fields."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = context.target_min_block_size = 1  # bytes: no two batches share a block
    label = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # the input lies on this machine
    read = ray.data.read_datasource(_datasource(batches), override_num_blocks=1, num_cpus=0, label_selector=label)
    return read.map_batches(
        _Worker,
        fn_constructor_args=(how.build, os.getcwd()),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=how.actors),
        num_gpus=_gpus(how),
        num_cpus=1,
    )


def _datasource(batches: Batches) -> Any:
    import pyarrow as pa
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    folder = os.getcwd()

    def read() -> Iterator[Any]:
        os.chdir(folder)
        for one in batches():
            yield pa.table({"batch": [pickle.dumps(one)]})

    class OneReader(Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, unknown)]

    return OneReader()


class _Worker:
    """An actor. What is to be told to the user travels as a value; Ray would try again and wrap it."""

    def __init__(self, build: Callable[[], BatchWork], folder: str) -> None:
        self.failed: POError | None = None
        if os.path.isdir(folder):  # what relative paths are relative to, where the machine has it
            os.chdir(folder)
        try:
            self.work = build()
        except POError as e:
            self.failed = e

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        return pa.table({"done": [pickle.dumps(self._done(pickle.loads(b.as_py()))) for b in table["batch"]]})

    def _done(self, records: list[Any]) -> Sequence[Outcome] | POError:
        try:
            return self.failed or self.work(records)
        except POError as e:
            return e
