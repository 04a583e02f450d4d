"""What is sent to servers that speak S3 in their own ways."""

from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import sync

from job.storage.backends.s3 import S3

CHUNKED = b"STREAMING-UNSIGNED-PAYLOAD-TRAILER"
"""The hash that stands for a body in chunks, with its checksum behind it."""


class Sent(Exception):
    """The request, instead of its answer."""


def request(method: str, **arguments: object) -> Any:
    """The HTTP request that a call of S3 would send, at the endpoint of the environment."""
    filesystem: Any = S3().create("s3", "s3://bucket")

    def stop(request: Any, **_: object) -> None:
        raise Sent(request)

    async def call() -> Any:
        client = await filesystem.set_session(refresh=True)
        client.meta.events.register("before-send.s3", stop)
        try:
            await getattr(client, method)(Bucket="bucket", **arguments)
        except Sent as sent:
            return sent.args[0]

    return sync(filesystem.loop, call)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REQUEST_CHECKSUM_CALCULATION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "cn-hangzhou")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


@pytest.mark.parametrize(
    "host",
    [
        *("oss-cn-hangzhou.aliyuncs.com", "oss-cn-hangzhou-internal.aliyuncs.com"),
        *("cos.ap-guangzhou.myqcloud.com", "tos-s3-cn-beijing.volces.com"),
        *("tos-s3-cn-beijing.ivolces.com", "tos-s3-ap-southeast-1.bytepluses.com"),
        "tos-s3-ap-southeast-1.ibytepluses.com",
    ],
)
def test_the_bucket_is_in_the_host_s_name_where_the_server_wants_it_there(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{host}")
    put = request("put_object", Key="a/b", Body=b"1")
    assert put.url == f"https://bucket.{host}/a/b"
    assert put.headers["X-Amz-Content-SHA256"] != CHUNKED
    assert request("list_objects_v2").url.startswith(f"https://bucket.{host}/?list-type=2")


def test_other_servers_get_the_bucket_in_the_path_unless_boto_s_file_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example.com:9000")
    put = request("put_object", Key="a", Body=b"1")
    assert put.url == "https://minio.example.com:9000/bucket/a"
    assert put.headers["X-Amz-Content-SHA256"] == CHUNKED

    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    put = request("put_object", Key="a", Body=b"1")
    assert put.url == "https://bucket.minio.example.com:9000/a"
    assert put.headers["X-Amz-Content-SHA256"] != CHUNKED
