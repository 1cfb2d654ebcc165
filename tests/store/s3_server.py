"""A real S3 server in a process of its own (moto), for tests of stores in object storage."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3

BUCKET = "gradients"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "told-to-nobody", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Start the server with an empty bucket; yields the environment that leads to it."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with tempfile.NamedTemporaryFile("r") as told:  # a pipe that nobody empties would stop the server in the end
        with open(told.name, "w") as log:
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            endpoint = _endpoint(told.name, server)
            _make_bucket(endpoint)
            yield {**KEYS, "AWS_ENDPOINT_URL": endpoint}
        finally:
            server.terminate()
            server.wait()


def _make_bucket(endpoint: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=KEYS["AWS_REGION"],
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()


def _endpoint(told: str, server: subprocess.Popen[bytes]) -> str:
    for _ in range(600):
        found = re.search(r"Running on (http://\S+)", Path(told).read_text())
        if found:
            return found[1]
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"moto's server did not start: {Path(told).read_text()}")
