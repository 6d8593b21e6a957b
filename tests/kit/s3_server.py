"""A real S3 server on this machine: moto's, in a process that ends with the one that started it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SERVE = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
KEYS = {"aws_access_key_id": "AKIDTEST", "aws_secret_access_key": "the-s3cret-of-this-test"}


POLICY = json.dumps(
    {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::data/empty"}],
    }
)


class S3Server:
    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.client = self.connected()

    def connected(self, **keys: str) -> Any:
        """A client of the test's own."""
        import botocore.session
        from botocore.config import Config

        session = botocore.session.Session()
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2})
        return session.create_client(
            "s3", region_name="us-east-1", endpoint_url=self.url, config=config, **(keys or KEYS)
        )

    @contextlib.contextmanager
    def checking_keys(self) -> Iterator[dict[str, str]]:
        """Inside, requests need a key that the server knows; yields one that may read `data/empty` only."""
        import botocore.session
        import requests

        iam = botocore.session.Session().create_client("iam", region_name="us-east-1", endpoint_url=self.url, **KEYS)
        name = f"user-{secrets.token_hex(4)}"
        iam.create_user(UserName=name)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=POLICY)
        requests.post(f"{self.url}/moto-api/reset-auth", data=b"0", timeout=10)
        try:
            yield {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}
        finally:
            requests.post(f"{self.url}/moto-api/reset-auth", data=b"inf", timeout=10)

    def put(self, bucket: str, objects: dict[str, bytes]) -> None:
        with contextlib.suppress(self.client.exceptions.BucketAlreadyOwnedByYou):
            self.client.create_bucket(Bucket=bucket)
        for key, data in objects.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def get(self, bucket: str, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def keys(self, bucket: str) -> list[str]:
        return [each["Key"] for each in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def uploads(self, bucket: str) -> list[str]:
        """Keys of the multipart uploads that are open."""
        return [each["Key"] for each in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with subprocess.Popen(
        (sys.executable, "-c", SERVE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield S3Server(int(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait()
