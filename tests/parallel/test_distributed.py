"""How a process knows that it is one of several. What they do together: test_train_processes.py."""

import os

import pytest

from opt_jax.parallel import agreement, processes
from opt_jax.parallel.watchdog import Watchdog

SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "in_cluster"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "2"}, False),  # an allocation without a step: a batch script, or a shell
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod, but not of an indexed job
    ],
)
def test_clusters_are_known_by_their_environment(monkeypatch, variables, in_cluster):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.in_cluster() == in_cluster


@pytest.mark.parametrize(
    ("variables", "packages", "devices", "in_cluster"),
    [
        ({}, ["libtpu"], 4, True),  # a Cloud TPU VM: JAX asks its metadata server
        ({}, ["libtpu"], 0, False),
        ({}, [], 4, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ["libtpu"], 4, False),
        ({"JAX_PLATFORMS": "cpu"}, ["libtpu"], 4, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, ["libtpu"], 4, True),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ["libtpu"], 0, False),  # as for a plan
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, ["libtpu"], 4, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, ["libtpu"], 4, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, ["kubernetes"], 0, True),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            [],
            0,
            False,
        ),  # JAX could not ask the cluster
    ],
)
def test_tpu_hosts_and_kubernetes_jobs_are_known(monkeypatch, variables, packages, devices, in_cluster):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object() if name in packages else None)
    monkeypatch.setattr(processes, "_tpu_devices", lambda: ["/dev/accel0"] * devices)
    assert processes.in_cluster() == in_cluster


def test_a_pod_that_cannot_find_the_others_does_not_work_alone(monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "10")
    with pytest.raises(ValueError, match="pod 10 of a Kubernetes job cannot find the others: pip install kubernetes"):
        processes.start()
    processes.start("off")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("auto", "localhost", 2, 0), "--coordinator-address localhost: needs a host and a port"),
        (("auto", "localhost:1", 2), "--coordinator-address, --num-processes and --process-id go together"),
        (("auto", None, None, 1), "--coordinator-address, --num-processes and --process-id go together"),
        (("off", "localhost:1", 2, 0), "--distributed off: leave out --coordinator-address"),
    ],
)
def test_half_a_job_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*arguments)


def test_a_process_alone_agrees_with_itself():
    processes.start()
    agreement.check_same({"seed": 1})
    processes.reached("anything")
    assert agreement.from_first(lambda: b"bytes") == b"bytes"
    with pytest.raises(SystemExit, match="job: error: bad"), processes.last_words("job"):
        raise ValueError("bad")
    with pytest.raises(KeyError), processes.last_words("job"):
        raise KeyError("a fault of the program keeps its traceback")


def test_progress_puts_off_the_end_of_a_job_that_stands_still(monkeypatch):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    watchdog = Watchdog(0, 2, seconds=60, hang_minutes=1, exit_code=75)
    watchdog._since -= 120
    with pytest.raises(SystemExit, match="75"):
        watchdog._look_around()
    watchdog.reached("step 2")
    watchdog._look_around()
