"""Checks of remote access: inputs, the output, and the credentials used for them."""

import os
from collections.abc import Callable, Iterator, Sequence

from job import log, storage
from job.artifacts.nesting import refuse_nested
from job.doctor.check import Check, attempt, fail, failed, note, ok, warn
from job.doctor.subject import Subject
from job.export.push import HubRepository, HubTarget
from job.families import adapter_source, model_source
from job.prep import discovery
from job.storage import retry
from job.storage.backends.hub import hub_offline_variable, offline
from job.storage.connect import CONNECT_SECONDS

TAIL = 4
"""Characters of an access key id to show: enough to recognize it, useless otherwise."""
UNNEEDED_SECONDS = 3
"""Timeout for the hub if no input needs it."""
STS = ("AWS_ENDPOINT_URL_STS", "AWS_ENDPOINT_URL")


def checks(subject: Subject) -> Iterator[Check]:
    push = _push_target(subject)
    hub = [uri for uri in subject.uris if uri.startswith("hf://")]
    hub += [push.uri] if push else []
    s3 = any(uri.startswith(("s3://", "s3a://")) for uri in subject.uris)
    if s3 or (subject.spec is None and "AWS_ACCESS_KEY_ID" in os.environ):
        yield s3_identity()
    yield from hub_checks(hub)
    if subject.spec is None:
        yield note("inputs", "not checked: `doctor SPEC` checks those of a spec")
        return
    spec = subject.spec

    def model() -> str:
        source = model_source.find_model(spec.model)
        _ = source.digest  # reading the digest proves access
        return f"{source.uri} ({log.size(source.size_bytes)})"

    def output() -> str:
        refuse_nested(spec.output.uri)
        storage.check_access(spec.output.uri, "write")
        return f"{spec.output.uri}: wrote an object and deleted it"

    def adapter() -> str:
        assert spec.model.adapter_name_or_path is not None
        source = adapter_source.find_adapter(spec.model.adapter_name_or_path)
        _ = source.digest
        return f"{source.uri} ({log.size(source.size_bytes)})"

    yield _attempt("model", model)
    if spec.model.adapter_name_or_path is not None:
        yield _attempt("adapter", adapter)
    for field, source in spec.data.sources().items():

        def rows(field: str = field, source: discovery.SourceSpec = source) -> str:
            found = discovery.find_source(source, field)
            _ = found.digest
            files = "" if found.builtin else f" ({len(found.files)} files)"
            return f"{found.uri}{files}"

        yield _attempt(f"{field.removeprefix('$.data.')} rows", rows)
    yield _attempt("output", output)
    if push is not None:
        yield _attempt("push", HubRepository(push).require_writable)


def _push_target(subject: Subject) -> HubTarget | None:
    """The repository that the spec pushes to, if it pushes."""
    if subject.spec is None or not subject.spec.export.push_to_hub:
        return None
    return HubTarget.of(subject.spec.export)


def s3_identity() -> Check:
    """Shows whose S3 keys are used, never the keys themselves."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import get_session

    name, session = "s3 identity", get_session()
    try:
        credentials = session.get_credentials()
        frozen = credentials.get_frozen_credentials() if credentials else None
    except (BotoCoreError, ClientError) as error:
        return fail(name, f"cannot get keys: {error}", "check the role and its token")
    if credentials is None or frozen is None:
        return warn(
            name,
            "no keys: only public buckets can be read",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role",
        )
    shown = f"key …{frozen.access_key[-TAIL:]} from {credentials.method}"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and STS[0] not in os.environ:
        return ok(name, f"{shown}, for {endpoint}")
    settings = Config(
        connect_timeout=CONNECT_SECONDS, read_timeout=CONNECT_SECONDS, retries={"max_attempts": 1}
    )
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    try:
        client = session.create_client("sts", region_name=region, config=settings)
        return ok(name, f"{client.get_caller_identity()['Arn']} ({shown})")
    except ClientError as error:
        fix = "renew the keys; AWS_SESSION_TOKEN belongs to temporary ones"
        return fail(name, f"{shown}: refused: {error.response['Error'].get('Code')}", fix)
    except BotoCoreError as error:  # buckets may be reachable even if this service is not
        return warn(name, f"{shown}; identity lookup failed: {error}", "open TCP 443 to AWS")


def hub_checks(needed: Sequence[str]) -> Iterator[Check]:
    """Checks that the hub answers, and the token. Fails only if one of the URIs needs it."""
    for uri in needed or ("hf://",):
        if (variable := hub_offline_variable(uri)) is not None:
            yield (
                failed("hub", offline(uri, variable))
                if needed
                else note("hub", f"not checked: {variable} is set; no hf:// input needs it")
            )
            return
    from httpx import HTTPError
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN")
    try:
        seconds = CONNECT_SECONDS if needed else UNNEEDED_SECONDS
        answer = get_session().head(endpoint, timeout=seconds, follow_redirects=True)
        if answer.status_code >= 500:
            raise HTTPError(f"status {answer.status_code}")
    except HTTPError as error:
        if not needed:
            yield note("hub", f"{endpoint} does not answer; no hf:// input needs it")
            return
        reason = str(error) or type(error).__name__
        yield fail(
            "hub",
            f"{endpoint} does not answer: {reason}",
            "open TCP 443 to it, set HF_ENDPOINT to a mirror, or store the inputs in a bucket",
        )
        return
    yield ok("hub", f"{endpoint} answers")
    if not token:
        if needed:
            yield note("hub identity", "no HF_TOKEN: public repositories only")
        return
    try:
        yield ok("hub identity", str(HfApi(endpoint=endpoint, token=token).whoami()["name"]))
    except (HfHubHTTPError, HTTPError) as error:
        yield warn(
            "hub identity",
            f"HF_TOKEN is refused: {error}".splitlines()[0],
            "set a valid token",
        )


def _attempt(name: str, probe: Callable[[], str]) -> Check:
    with retry.at_most(1):
        return attempt(name, probe)
