"""The launchers, as far as a machine without a cluster runs them: with stand-ins for what a cluster has on its PATH."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_processes import SUPPORT, metrics

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SCRIPTS = ("slurm", "jobset", "tpu-vm")
NEEDED = {"slurm": (), "jobset": ("--image", "registry/jaxmed:1"), "tpu-vm": ("--name", "v5p", "--zone", "us-east5-a")}
COMMAND = ("tangerine", "pretrain", "--data.manifest", "/data/all scans.csv", "--out", "/runs/it's $(mae)")

# Runs a job where it is, with SLURM's variables.
SBATCH = """#!/usr/bin/env bash
cat > "$FAKE/job"
export SLURM_JOB_NUM_NODES=$(sed -n 's/^#SBATCH --nodes=//p' "$FAKE/job")
exec bash "$FAKE/job"
"""
# Starts one local process for every node; of their exit codes the highest is its own, as of srun.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$FAKE/srun.txt"; shift; done
processes=() highest=0
for ((number = 0; number < SLURM_JOB_NUM_NODES; number++)); do
  SLURM_PROCID=$number SLURM_NTASKS=$SLURM_JOB_NUM_NODES SLURM_LOCALID=0 SLURM_STEP_NODELIST=localhost "$@" &
  processes+=($!)
done
for process in "${processes[@]}"; do
  code=0
  wait "$process" || code=$?
  if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$FAKE/scontrol.txt"\n'
# Notes its arguments and ends with the exit codes of $CODES, one a call.
JAXMED = """#!/usr/bin/env bash
printf '%s\\n' "$@" '--' >> "$FAKE/calls"
number=$(grep -c -x -e '--' "$FAKE/calls")
exit "$(echo "$CODES" | cut -d ' ' -f "$number")"
"""
KUBECTL = '#!/usr/bin/env bash\necho "$@" > "$FAKE/kubectl.txt"\ncat > "$FAKE/yaml"\n'
# Runs the command of one worker here, as ssh would there.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/gcloud.txt"
for word in "$@"; do
  if [[ $word == --command=* ]]; then bash -c "${word#--command=}" || exit 1; fi
done
"""


@pytest.fixture
def cluster(tmp_path):
    """Return a folder of stand-ins, and the environment in which they are found first."""
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "kubectl": KUBECTL, "gcloud": GCLOUD}
    for name, text in {**programs, ".venv/bin/jaxmed": JAXMED}.items():
        path = tmp_path / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    fake = tmp_path / "fake"
    environment = {
        **os.environ, "PATH": f"{fake}{os.pathsep}{os.environ['PATH']}", "FAKE": str(fake),
        "JAXMED": str(fake / ".venv" / "bin" / "jaxmed"), "SLURM_JOB_ID": "7", "CODES": "0",
        "HOME": str(tmp_path),
    }  # fmt: skip
    return fake, environment


def launch(script, *words, environment=None):
    command = [str(LAUNCH / script), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def calls(fake):
    """Return the arguments of every start of the stand-in for jaxmed."""
    text = (fake / "calls").read_text() if (fake / "calls").exists() else ""
    return [call.splitlines() for call in text.split("--\n") if call]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_of_every_option_and_shows_a_command(script):
    found = launch(script, "--help")
    known = set(re.findall(r"^    (--[a-z-]+)\)", (LAUNCH / script).read_text(), re.MULTILINE))
    assert found.returncode == 0 and len(known) >= 5
    assert known <= set(re.findall(r"--[a-z-]+", found.stdout))
    assert f"scripts/launch/{script} --" in found.stdout and "Exit code 2" in found.stdout
    assert "#" not in found.stdout and "set -euo" not in found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--", "tangerine", "pretrain"), "--out: expected a run folder that every node sees, found nothing"),
        (("--", *COMMAND, "--overwrite"), "--overwrite: expected a command that goes on where it was"),
        (("--", *COMMAND, "--mesh.processes=2"), "--mesh.processes=2: expected no option that joins processes"),
        (("--nods", "2"), "--nods: expected an option of this script, or -- before the command"),
        (("--retries", "many", "--", *COMMAND), "--retries: expected a whole number of 0 or more, found many"),
        (("--retries",), "--retries: expected a value, found nothing"),
        ((), "command: expected -- SYSTEM STAGE ... --out RUN at the end"),
    ],
)
def test_mistakes_end_in_one_line(script, words, line):
    found = launch(script, *NEEDED[script], *words)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith(f"jaxmed: {line}") and found.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_starts_nothing(script, cluster):
    fake, environment = cluster
    before = sorted(fake.rglob("*"))
    found = launch(script, *NEEDED[script], "--dry-run", "--", *COMMAND, environment=environment)
    assert found.returncode == 0 and "tangerine" in found.stdout and found.stderr == ""
    assert sorted(fake.rglob("*")) == before


# SLURM ---------------------------------------------------------------------------------------------------------------


def test_slurm_gets_one_process_per_node_with_all_of_its_gpus(tmp_path):
    (tmp_path / "modules.sh").write_text("")
    options = ("--nodes", 4, "--gpus-per-node", 2, "--time", "1:00:00", "--sbatch=--partition=gpu")
    found = launch("slurm", *options, "--setup", tmp_path / "modules.sh", "--dry-run", "--", *COMMAND).stdout
    batch = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", found, re.MULTILINE))
    wanted = {"nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "2", "time": "1:00:00", "partition": "gpu"}
    assert wanted.items() <= batch.items()
    assert batch["signal"] == "TERM@120" and batch["job-name"] == "jaxmed-tangerine-pretrain"
    assert "export JAX_LOCAL_DEVICE_IDS=0,1\n" in found
    assert f"source {tmp_path}/modules.sh\n" in found
    command = shlex.split(re.search(r"^command=\((.*)\)$", found, re.MULTILINE)[1])
    assert command[1:] == [*COMMAND, "--mesh.distributed"]
    alone = launch("slurm", "--gpus-per-node", 0, "--dry-run", "--", *COMMAND).stdout
    assert "--mesh.distributed" not in alone and "JAX_LOCAL_DEVICE_IDS" not in alone


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [("0", 0, 1), ("1 137 0", 0, 3), ("1 1 1 1", 1, 3), ("2", 2, 1), ("1 2", 2, 2), ("130", 130, 1)],
)
def test_slurm_starts_again_what_failed_but_not_a_mistake(cluster, codes, code, starts):
    fake, environment = cluster
    options = ("--retries", 2, "--pause", 0, "--gpus-per-node", 0)
    found = launch("slurm", *options, "--", *COMMAND, environment=environment | {"CODES": codes})
    assert (found.returncode, len(calls(fake))) == (code, starts), found.stderr
    assert all(call == list(COMMAND) for call in calls(fake))
    assert ("not started again" in found.stderr) == (code in (2, 130))
    assert ("no start is left" in found.stderr) == (code == 1)


def test_slurm_puts_a_job_that_was_told_to_stop_back_into_the_queue(cluster):
    fake, environment = cluster
    options = ("--retries", 2, "--pause", 0)
    found = launch("slurm", *options, "--", *COMMAND, environment=environment | {"CODES": "143"})
    assert found.returncode == 0 and (fake / "scontrol.txt").read_text() == "requeue 7\n"
    environment |= {"CODES": "143 143", "SLURM_RESTART_COUNT": "2"}
    assert launch("slurm", *options, "--", *COMMAND, environment=environment).returncode == 143
    assert (fake / "scontrol.txt").read_text() == "requeue 7\n" and len(calls(fake)) == 2


def slurm_job_id():
    """Return the number of a job for which jax, which takes its port from it, finds that port free."""
    for number in range(1, 4096):
        with socket.socket() as place:
            try:
                place.bind(("", 61440 + number))
            except OSError:
                continue
            return str(number)
    raise AssertionError("no port is free")


@pytest.mark.multiprocess
def test_two_processes_of_slurm_find_each_other_and_train_together(tmp_path, cluster):
    fake, environment = cluster
    toy = fake / "toy"
    # The words for system and stage are not the toy's.
    words = shlex.join([sys.executable, str(SUPPORT / "train_toy.py")])
    toy.write_text(f'#!/usr/bin/env bash\nshift 2\nexec {words} "$@"\n')
    toy.chmod(0o755)
    environment |= {
        "JAXMED": str(toy), "SLURM_JOB_ID": slurm_job_id(), "TOY_DEVICES": "2", "NPROC": "16", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
    }  # fmt: skip
    options = ("--nodes", 2, "--gpus-per-node", 0, "--retries", 0)
    found = launch("slurm", *options, "--", "toy", "train", "--out", tmp_path / "two", environment=environment)
    assert found.returncode == 0, found.stderr[-3000:]
    assert (fake / "srun.txt").read_text().split() == ["--ntasks-per-node=1", "--wait=180"]
    # Two that had not met would each have written all lines.
    assert [line["step"] for line in metrics(tmp_path / "two")] == list(range(1, 31))


# Kubernetes ----------------------------------------------------------------------------------------------------------


def jobset(*options, command=COMMAND):
    found = launch("jobset", "--image", "registry/jaxmed:1", *options, "--dry-run", "--", *command)
    assert found.returncode == 0, found.stderr
    return yaml.safe_load(found.stdout)


def test_jobset_has_one_pod_per_machine_and_restarts_all_but_a_mistake():
    record = jobset("--name", "mae", "--pods", 4, "--gpus", 2, "--retries", 5, "--volume", "claim:/shared")
    assert (record["apiVersion"], record["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = record["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    rules = [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]]
    assert rules == [("FailJobSet", ["PodFailurePolicy"])]
    (workers,) = record["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (4, 4, 0)
    assert job["completionMode"] == "Indexed"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert places["volume-0"] == "/shared" and {volume["name"] for volume in pod["volumes"]} == set(places)
    assert pod["volumes"][-1]["persistentVolumeClaim"] == {"claimName": "claim"}


def test_pods_find_the_first_by_its_name_and_know_their_number():
    record = jobset("--name", "mae", "--pods", 4)
    (workers,) = record["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    words = container["args"]
    # Kubernetes writes $$( for a plain $(, and puts the value of a variable in place of $(NAME).
    assert [word.replace("$$(", "$(") for word in words[: len(COMMAND)]] == list(COMMAND)
    assert words[len(COMMAND) :] == [
        "--mesh.distributed", "--mesh.coordinator", "mae-workers-0-0.mae:8476", "--mesh.processes", "4",
        "--mesh.process=$(JOB_COMPLETION_INDEX)",
    ]  # fmt: skip
    assert workers["name"] == "workers" and record["spec"]["network"]["enableDNSHostnames"] is True
    assert [entry["name"] for entry in container["env"]] == ["JOB_COMPLETION_INDEX"]


def test_one_pod_joins_nobody_and_tpus_are_asked_for_by_type_and_topology():
    record = jobset("--tpu", "tpu-v5p-slice:4x4x4:4")
    pod = record["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4",
    }  # fmt: skip
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert not [word for word in pod["containers"][0]["args"] if word.startswith("--mesh")]
    for options in (("--name", "Has Space"), ("--volume", "claim"), ("--tpu", "v5p"), ("--pods", 0)):
        found = launch("jobset", "--image", "registry/jaxmed:1", *options, "--dry-run", "--", *COMMAND)
        assert found.returncode == 2 and found.stderr.startswith(f"jaxmed: {options[0]}: expected")


def test_jobset_is_applied_by_kubectl(cluster):
    fake, environment = cluster
    options = ("--image", "registry/jaxmed:1", "--namespace", "lab")
    found = launch("jobset", *options, "--", *COMMAND, environment=environment)
    assert found.returncode == 0, found.stderr
    assert (fake / "kubectl.txt").read_text() == "--namespace lab apply -f -\n"
    assert yaml.safe_load((fake / "yaml").read_text()) == jobset()


# TPU VMs -------------------------------------------------------------------------------------------------------------


def test_a_tpu_vm_runs_the_command_on_every_worker(cluster):
    fake, environment = cluster
    options = ("--name", "v5p", "--zone", "us-east5-a", "--project", "lab", "--folder", fake)
    found = launch("tpu-vm", *options, "--", *COMMAND, environment=environment)
    assert found.returncode == 0, found.stderr
    words = (fake / "gcloud.txt").read_text().splitlines()
    assert words[:7] == [
        "compute", "tpus", "tpu-vm", "ssh", "v5p", "--zone=us-east5-a", "--project=lab",
    ]  # fmt: skip
    assert "--worker=all" in words
    assert calls(fake) == [[*COMMAND, "--mesh.distributed"]]  # quoted for two shells, and whole again


@pytest.mark.parametrize(("codes", "code", "starts"), [("1 0", 0, 2), ("1 1 1", 1, 3), ("1 2", 2, 2), ("143", 143, 1)])
def test_a_tpu_vm_is_started_again_but_not_for_a_mistake(cluster, codes, code, starts):
    """The exit code of gcloud does not say what the workers ended with: their last lines do."""
    fake, environment = cluster
    options = (*NEEDED["tpu-vm"], "--folder", fake, "--retries", 2, "--pause", 0)
    found = launch("tpu-vm", *options, "--", *COMMAND, environment=environment | {"CODES": codes})
    assert (found.returncode, len(calls(fake))) == (code, starts), found.stderr


def test_a_tpu_vm_is_named(cluster):
    for missing in ("--name", "--zone"):
        words = list(NEEDED["tpu-vm"])
        del words[words.index(missing) : words.index(missing) + 2]
        found = launch("tpu-vm", *words, "--dry-run", "--", *COMMAND)
        assert found.returncode == 2 and found.stderr.startswith(f"jaxmed: {missing}: expected")
