"""Servers of S3 and of Azure's blobs on loopback, with test credentials."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hmac
import logging
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import urllib3

TEST_KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, Any]]:
    """Yields the endpoint of a server, and a client of boto3."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    try:
        yield endpoint, client
    finally:
        client.close()
        server.shutdown()
        server.server_close()
        thread.join(30)


AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = (  # of every Azurite, as documented
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@contextlib.contextmanager
def azure_server(container: str) -> Iterator[str]:
    """Yields the connection string of a server with a container. Skips the test without Azurite."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not on the PATH: npm install --global azurite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    with subprocess.Popen(
        [program, "--blobPort", port, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # it complains when its output is closed
        text=True,
    ) as process:
        try:
            assert process.stdout
            assert any("successfully listens" in line for line in process.stdout)
            endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
            _create_container(endpoint, container)
            yield f"AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint={endpoint}"
        finally:
            process.terminate()


def _create_container(endpoint: str, container: str) -> None:
    date = email.utils.formatdate(usegmt=True)
    signed = (
        "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-12-02\n"
        f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}\nrestype:container"
    )
    digest = hmac.digest(base64.b64decode(AZURE_KEY), signed.encode(), "sha256")
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-12-02",
        "Authorization": f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}",
    }
    url = f"{endpoint}/{container}?restype=container"
    assert urllib3.request("PUT", url, headers=headers).status == 201
