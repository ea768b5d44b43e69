#!/usr/bin/env python3
"""Submit a training run to a Ray cluster as a job, and follow it:

    python launch/ray_job.py configs/quickstart.yaml --run-dir /shared/runs/first [ist train options]

RAY_API_SERVER_ADDRESS is the cluster's dashboard, http://127.0.0.1:8265 by default; set RAY_AUTH_MODE=token and
RAY_AUTH_TOKEN_PATH as for every client. This folder is uploaded as the job's working directory, so the cluster's nodes
need only the package's dependencies. If you submit again with the same --run-dir, which every driver must be able to
read, the run resumes from its last checkpoint.
"""

import argparse
import asyncio
import os
import re
import shlex
import sys
import time
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).resolve().parent.parent
EXCLUDED = [".git", ".venv", ".*cache", "/runs", "/docs", "/tests", "/benchmarks", "*.egg-info"]


def submit(client: JobSubmissionClient, command: str) -> str:
    """Submit a job; retry while a new cluster does not accept jobs yet."""
    environment = {"working_dir": str(ROOT), "excludes": EXCLUDED}
    for _ in range(12):
        try:
            return client.submit_job(entrypoint=command, runtime_env=environment)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            time.sleep(5)
    sys.exit("the cluster accepts no jobs: none of its nodes runs Ray's dashboard agent (pip install 'ray[default]')")


async def follow(client: JobSubmissionClient, job: str) -> JobStatus:
    """Print a job's output until it ends, and return its final status."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
    while not (status := client.get_job_status(job)).is_terminal():
        await asyncio.sleep(1)
    return status


def main() -> None:
    """Submit, follow, and exit with 0 if the job succeeded."""
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--run-dir", type=Path)
    run_dir = folder.parse_known_args()[0].run_dir
    if run_dir is None or not run_dir.is_absolute() or {"-h", "--help"} & set(sys.argv):
        sys.exit(f"{__doc__}\n--run-dir is required: an absolute path")
    if any(re.search(r"://\S*:\S*@", argument) for argument in sys.argv):
        sys.exit(
            "a URL on this command line contains a password, which Ray's dashboard would show: use the environment"
        )
    command = ["python", "-m", "ist", "train", *sys.argv[1:], "--pool", "ray", "--address", "auto", "--auto-resume"]
    client = JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    job = submit(client, shlex.join(command))
    print(f"job {job}: {shlex.join(command)}", file=sys.stderr)
    try:
        status = asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        sys.exit(f"job {job}: stopped; submit it again to resume")
    sys.exit(0 if status == JobStatus.SUCCEEDED else f"job {job}: {status}")


if __name__ == "__main__":
    main()
