"""Several processes as one run: how they find each other, and what ends them all."""

import os
import socket
import sys
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as lost.
HEARTBEAT = 30
# Seconds that a process which ends by itself waits for the others to do so.
SHUTDOWN = 60
# What a launcher starts again (EX_TEMPFAIL of sysexits.h), as whatever a signal ended.
TRY_AGAIN = 75

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(*, detect: bool, timeout: int) -> None:
  """Joins the processes of a run; must come before anything asks for devices.

  There are several where the environment has JAX_COORDINATOR_ADDRESS (host:port of process 0),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID, in a Slurm step of several tasks, on TPU hosts that know of
  others, and where `detect` asks JAX to look further (Cloud TPU's metadata, Open MPI, Kubernetes).
  Ends the process with `TRY_AGAIN` and a message if not all came in time.

  Args:
    detect: whether to take the environment for a cluster that shows in none of these variables.
    timeout: seconds that the others have to come.

  Raises:
    ValueError: the environment contradicts itself, or is none that JAX knows.
  """
  asked = _asked_for(os.environ)
  if asked is None and not (detect or is_cluster(os.environ)):
    return
  address, count, index = asked or (None, None, None)
  late = threading.Timer(timeout, _give_up, (address, count, index, timeout))
  late.daemon = True
  late.start()
  try:
    # Beyond its own limit, JAX would end the process without naming what it waited for.
    jax.distributed.initialize(
      address,
      count,
      index,
      local_device_ids=local_devices(os.environ),
      initialization_timeout=timeout + 60,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=SHUTDOWN,
    )
  except (ValueError, RuntimeError) as error:
    raise ValueError(
      f"cannot join the other processes of the run: {error}; set {ADDRESS}, {COUNT} and {INDEX}, "
      "or start it without --distributed"
    ) from error
  finally:
    late.cancel()


def agreed(found: bool) -> bool:
  """What process 0 has found, on all processes: one verdict."""
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(found)))


def is_cluster(environment: Mapping[str, str]) -> bool:
  """Whether variables of Slurm or a TPU slice tell of several processes."""
  tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
  return int(tasks) > 1 or len(hosts.split(",")) > 1


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
  """All GPUs of a node that has one Slurm task; left to itself, JAX would take the first alone."""
  gpus = environment.get("SLURM_GPUS_ON_NODE", "")
  tasks, nodes = (environment.get(f"SLURM_STEP_NUM_{name}") for name in ("TASKS", "NODES"))
  if "JAX_LOCAL_DEVICE_IDS" in environment or not gpus.isdecimal() or tasks != nodes:
    return None
  return list(range(int(gpus)))


def _asked_for(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
  given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
  if not given:
    return None
  if len(given) < 3:
    raise ValueError(f"{ADDRESS}, {COUNT} and {INDEX} go together, but there are only {given}")
  address, count, index = given.values()
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"{ADDRESS} must be host:port, got {address!r}")
  if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
    raise ValueError(f"{INDEX} must be one of 0 to {COUNT} - 1, got {index!r} of {count!r}")
  return address, int(count), int(index)


def _give_up(address: str | None, count: int | None, index: int | None, timeout: int) -> None:
  who = "this process" if index is None else f"process {index} of {count}"
  where = f" at {address}" if address else ""
  print(
    f"error: {who} waited {timeout} s{where} for the others, and not all came"
    f"{_reachability(address, index)}. Are all hosts up, started with the same {ADDRESS} and "
    f"{COUNT}, each with a {INDEX} of its own? --startup_timeout gives them longer",
    file=sys.stderr,
    flush=True,
  )
  os._exit(TRY_AGAIN)


def _reachability(address: str | None, index: int | None) -> str:
  """What a plain connection to the coordinator finds, from any process but its own."""
  if address is None or index == 0:
    return ""
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError as error:
    return f"; the coordinator cannot be reached: {error}"
  return "; the coordinator can be reached"
