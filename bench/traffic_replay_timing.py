"""How far the requests of a timed replay start from their schedule.

A trace of Poisson arrivals (50 requests/s for 60 s by default) is replayed with `Timed` against the endpoint of
`bench/traffic_endpoint.py`, which runs in a process of its own and notes each arrival on the shared monotonic clock.

    delay_i = (arrival_i - schedule_i) - min_j (arrival_j - schedule_j)

so the constant time from one process to the other drops out, and every lateness of client, HTTP library and kernel
stays in. Arrivals and schedule are paired by the request's number, which is its message.

A process that does nothing but sleep 20 ms at a time runs beside it: how late its timer is says what the machine itself
does to a process that waits (on a machine with other work, milliseconds to tenths of a second).

    python bench/traffic_replay_timing.py [--seconds 60] [--rate 50] [--tokens 32] [--real-time] [--json]

`--real-time` gives client and endpoint a real-time priority where the user may (root, CAP_SYS_NICE), so that other work
on the machine is not measured along.

Output: p50, p99 and largest delay in ms as the endpoint saw them, as the client did, and of the idle timer; exit 1 when
the p99 at the endpoint is above 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

from reap_serve.traffic.endpoint import ClientSettings
from reap_serve.traffic.replay import replay
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.schedule import Timed

LIMIT_SECONDS = 0.020
# Sleeps until its input is closed, then prints how late it woke each time.
IDLE_TIMER = """
import json, select, sys, time
late = []
while True:
    due = time.monotonic() + 0.02
    time.sleep(0.02)
    late.append(time.monotonic() - due)
    if select.select([sys.stdin], [], [], 0)[0]:
        break
print(json.dumps(late))
"""


def trace(seconds: float, rate: float, seed: int = 0) -> list[Request]:
    """Chat requests with Poisson arrivals; the message of each is its number."""
    generator = random.Random(seed)
    requests: list[Request] = []
    moment = 0.0
    while moment < seconds:
        number = len(requests)
        body = {"messages": [{"role": "user", "content": str(number)}], "max_tokens": 64}
        requests.append(
            Request(
                body=body, kind="chat", slice="default", origin=Origin("made", "requests", number + 1), timestamp=moment
            )
        )
        moment += generator.expovariate(rate)
    return requests


def measure(seconds: float, rate: float, tokens: int) -> dict[str, float]:
    """Replays a trace against the made-up endpoint and compares its arrivals with the schedule, in seconds."""
    requests = trace(seconds, rate)
    command = [sys.executable, str(Path(__file__).with_name("traffic_endpoint.py")), "--tokens", str(tokens)]
    command += ["--gap-seconds", "0.01"]
    timer_command = [sys.executable, "-c", IDLE_TIMER]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as endpoint,
        subprocess.Popen(timer_command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as timer,
    ):
        assert endpoint.stdout is not None
        port = json.loads(endpoint.stdout.readline())["port"]
        result = asyncio.run(replay(requests, ClientSettings(url=f"http://127.0.0.1:{port}"), Timed()))
        endpoint.terminate()
        seen = json.loads(endpoint.stdout.readline())
        idle = np.array(json.loads(timer.communicate()[0]))
    summary = result.summary()
    if summary.failed:
        raise SystemExit(f"{summary.failed} of {summary.requests} requests failed: {summary.failures}")
    first = requests[0].timestamp or 0.0
    numbers = [int(body["messages"][0]["content"]) for body in seen["bodies"]]
    late = np.array(seen["arrivals"]) - np.array([(requests[number].timestamp or 0.0) - first for number in numbers])
    at_endpoint = late - late.min()
    at_client = np.array([outcome.started - outcome.scheduled for outcome in result.outcomes])
    return {
        "requests": len(requests),
        "endpoint_p50": float(np.percentile(at_endpoint, 50)),
        "endpoint_p99": float(np.percentile(at_endpoint, 99)),
        "endpoint_max": float(at_endpoint.max()),
        "client_p99": float(np.percentile(at_client, 99)),
        "client_max": float(at_client.max()),
        "idle_timer_p99": float(np.percentile(idle, 99)),
        "idle_timer_max": float(idle.max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--real-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.real_time:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(20))
        except PermissionError:
            print("no permission for a real-time priority; measured without", file=sys.stderr)
    found = measure(arguments.seconds, arguments.rate, arguments.tokens)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(f"{found['requests']:.0f} requests at {arguments.rate}/s over {arguments.seconds} s")
        print("delay of starts, ms   p50     p99     max")
        print(f"as the endpoint saw {1e3 * found['endpoint_p50']:6.2f}  {1e3 * found['endpoint_p99']:6.2f}  ", end="")
        print(f"{1e3 * found['endpoint_max']:6.2f}")
        print(f"as the client saw           {1e3 * found['client_p99']:6.2f}  {1e3 * found['client_max']:6.2f}")
        print(f"idle timer                  {1e3 * found['idle_timer_p99']:6.2f}  {1e3 * found['idle_timer_max']:6.2f}")
    sys.exit(found["endpoint_p99"] > LIMIT_SECONDS)
