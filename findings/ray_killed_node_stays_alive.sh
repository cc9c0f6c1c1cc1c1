#!/usr/bin/env bash
# Ray 2.60.0 on Python 3.11, a cluster of two nodes on one machine.
#
# A node is lost: its raylet is killed, as with a machine that goes away. What a driver then sees of an actor that was at
# work there is not that it has died: the call raises ActorUnavailableError ("The task may or may not have been
# executed"), although the actor has max_restarts=0 and can never come back, and for seconds `ray.nodes()` goes on
# listing the node as alive. One would expect ActorDiedError, as for an actor whose own process is killed, or a node
# that is not alive. Only later is the node dead. So a scheduler that asks `ray.nodes()` at once whether an actor died
# alone or with its node blames the task for the loss of the machine.
#
# Seen: ActorUnavailableError after 2.6 s, and the node counted as alive for 14.2 s after the kill.
#
# `im3d batch --ray` ends such an actor, waits up to 30 s for Ray to be sure, and counts nothing against the asset if the
# node is gone (im3d_jax/cluster/crew.py).
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.60.0
cat >"$directory/lost.py" <<'PY'
import time

import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
lost = cluster.add_node(num_cpus=1, labels={"which": "lost"})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


@ray.remote(num_cpus=1, max_restarts=0, label_selector={"which": "lost"})
class Actor:
    def ready(self):
        return True

    def work(self):
        time.sleep(600)


def is_alive():
    return any(node["Alive"] for node in ray.nodes() if node["Labels"].get("which") == "lost")


actor = Actor.remote()
ray.get(actor.ready.remote())
work = actor.work.remote()
time.sleep(1)
cluster.remove_node(lost, allow_graceful=False)
started = time.monotonic()
try:
    ray.get(work, timeout=60)
    seen = "no error"
except ray.exceptions.GetTimeoutError:
    seen = "no answer"
except ray.exceptions.RayActorError as error:
    seen = type(error).__name__
told, alive = time.monotonic() - started, is_alive()
while is_alive() and time.monotonic() - started < 120:
    time.sleep(0.2)
print(f"ray {ray.__version__}: {seen} after {told:.1f} s; node alive then: {alive}; in the end: {is_alive()}", flush=True)
print(f"it counted as alive for {time.monotonic() - started:.1f} s after the kill", flush=True)
assert (seen, alive, is_alive()) == ("ActorUnavailableError", True, False), "this has changed"
PY
# Ray prints the logs of the lost node among the lines.
"$directory/venv/bin/python" "$directory/lost.py" 2>/dev/null | grep -E "^(ray |it counted)"
